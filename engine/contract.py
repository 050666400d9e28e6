"""Finding a concept's file by its name."""

import importlib
import importlib.util
from types import ModuleType

SHELVES = ("language", "attention_variants", "posttraining", "vision", "scaling", "evaluation")


def find(name: str) -> ModuleType:
    """Import the file of that name, at the top or on one of the shelves."""
    for module in (name, *(f"{shelf}.{name}" for shelf in SHELVES)):
        if "." not in module or importlib.util.find_spec(module.partition(".")[0]):
            if importlib.util.find_spec(module):
                return importlib.import_module(module)
    raise ValueError(f"--model {name}: no such file")
