"""Settings of tests that draw their input: the same at every run; FUZZ=1000 draws so many new ones."""

import os

from hypothesis import HealthCheck, settings

PER_TEST_FIXTURES = HealthCheck.function_scoped_fixture  # which all examples of a test share


def drawn(n: int, *suppressed: HealthCheck) -> settings:
    """Return the settings of a test with n examples, without these health checks of hypothesis."""
    return settings(
        deadline=None,
        max_examples=int(os.environ.get("FUZZ", n)),
        derandomize="FUZZ" not in os.environ,
        suppress_health_check=suppressed,
        database=None,
    )
