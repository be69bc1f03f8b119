import subprocess
import sys

import pytest

IMPORT = """
import sys
from ray_jobs.cluster.worker_group import import_keras
import_keras()
assert "keras" in sys.modules
assert not {"matplotlib", "sklearn"} & sys.modules.keys()
import matplotlib, sklearn.metrics
"""


@pytest.mark.slow
def test_keras_is_imported_without_packages_that_can_be_imported_later():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
