"""Progress of long work: a bar on a terminal; in a log file a line every half minute."""

import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL = 30.0  # seconds between two lines of a log file


def progress_bar(iterable: Iterable | None = None, desc: str | None = None, **options) -> tqdm:
    """Return a tqdm bar, for its arguments. Where stderr is not a terminal, it writes no line in the first
    INTERVAL seconds, so that short work leaves none."""
    if sys.stderr.isatty():
        options = {"dynamic_ncols": True} | options
    else:
        seldom = dict(mininterval=INTERVAL, maxinterval=INTERVAL, delay=INTERVAL, leave=False, ncols=100)
        options = {"file": Lines()} | seldom | options
    bar = tqdm(iterable, desc, **options)

    # tqdm measures by the wall clock, which may be set while it runs, and has no option for another.
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = bar._time()
    return bar


class Lines:
    """A file for tqdm that writes each state of a bar to stderr as a line, instead of over the last one."""

    encoding = "ascii"  # makes tqdm draw its bar with #

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
