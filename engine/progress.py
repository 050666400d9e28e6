"""Progress of a training run: a bar on a terminal; in a log file a line now and then, such as

    step 120/1300  loss 4.321  val 4.512  12,345 tokens/s  2.1 min left

Both go to stderr. The time left follows from the mean speed since the start or the resume.
"""

import sys
import time

from tqdm import tqdm

from formats.progress import INTERVAL, progress_bar


def duration(seconds: float) -> str:
    """Return a time with its unit, such as "2.5 h", with three digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


class Progress:
    """The steps of a run, on stderr.

    A log file gets a line at each evaluation, when there is a new figure, and otherwise every INTERVAL
    seconds.
    """

    def __init__(self, total: int, first_step: int = 0, enabled: bool = True):
        """total: the last step. first_step: the steps that are made already. enabled: False on all ranks but
        0, which show nothing."""
        self.total, self.first_step, self.step, self.enabled = total, first_step, first_step, enabled
        self.figures: dict[str, str] = {}
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = progress_bar(total=total, initial=first_step, unit="step", smoothing=0)
        self.started = time.monotonic()
        # Of the last line: its time, its step, and the names of its figures.
        self.written, self.line_step, self.line_figures = self.started, None, set()

    def update(self, step: int) -> None:
        """Show that the steps before `step` are made."""
        if self.bar is not None:
            self.bar.update(step - self.step)
        self.step = step
        if self.line_step is not None:  # the first line waits for the first figures
            self.write_line(now=False)

    def show(self, **figures: str) -> None:
        """Show these figures, and those of earlier calls that have other names. A new value of "val" marks an
        evaluation."""
        evaluated = figures.get("val", self.figures.get("val")) != self.figures.get("val")
        self.figures |= figures
        if self.bar is not None:
            self.bar.set_postfix(self.figures)
        self.write_line(now=evaluated or bool(figures.keys() - self.line_figures))

    def note(self, text: str) -> None:
        """Print a line to stdout, above the bar if there is one."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> None:
        """End the bar; in a log file, write a last line unless the last step has one."""
        if self.bar is not None:
            self.bar.close()
        if self.figures and self.line_step != self.step:
            self.write_line(now=True)

    def write_line(self, now: bool) -> None:
        """Write a line to a log file, if now is True or INTERVAL has passed since the last one."""
        time_now = time.monotonic()
        if not self.enabled or self.bar is not None or not (now or time_now - self.written >= INTERVAL):
            return
        parts = [f"step {self.step}/{self.total}"]
        for name, value in self.figures.items():
            parts.append(f"{value} {name}" if name.endswith("/s") else f"{name} {value}")
        done, left = self.step - self.first_step, self.total - self.step
        if done and left:
            parts.append(f"{duration((time_now - self.started) / done * left)} left")
        print("  ".join(parts), file=sys.stderr, flush=True)
        self.written, self.line_step, self.line_figures = time_now, self.step, set(self.figures)
