"""Packages that are measured beside ours, and that the project itself does not need."""

import importlib


def require(module: str, package: str | None = None) -> None:
    """Import a module, before work starts. Raises ValueError if its package is not installed.

    package: what pip installs, if that has another name or must be of one version.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs {module}: pip install {package or module} ({error})") from None
