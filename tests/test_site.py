"Workflows that GitHub can read."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('path', sorted((ROOT/'.github/workflows').glob('*.yaml')), ids=lambda p: p.name)
def test_workflows_are_valid(path):
    tool = Path(sys.executable).parent/'check-jsonschema'
    r = subprocess.run([tool, '--builtin-schema', 'vendor.github-workflows', path], capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
