"""Every test runs offline, without the user's settings and caches, one torch thread per process.

Set while this file is imported, so that it holds for every library that reads it on import, and
for every process that a test starts.
"""

import os
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

pytest.register_assert_rewrite("tests.harness")

from tests.clouds import azure_server, google_server  # noqa: E402, F401 - fixtures for every test
from tests.s3 import rclone_server, s3_server  # noqa: E402, F401
from vlmbatch import placeholders  # noqa: E402

HOME = tempfile.TemporaryDirectory(prefix="vlmbatch-tests-", ignore_cleanup_errors=True)

os.environ.pop("VLMBATCH_MODEL", None)
os.environ.update(
    HF_HOME=HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

# No deadline: two test processes share two cores with what the tests start.
PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("local", **PATIENT)
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True, **PATIENT)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def nothing_is_hidden() -> Iterator[None]:
    """What one test's job spec hides, the messages of the next one may say."""
    yield
    placeholders._hidden.clear()


def pytest_unconfigure(config: pytest.Config) -> None:
    HOME.cleanup()
