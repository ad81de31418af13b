"Other versions of Python: the code compiles there without a warning. `make test PYTHON=python3.12` runs everything."
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def interpreter(version):
    "The path of a Python, on the search path or below pyenv's folder; None if there is none"
    found = shutil.which(f'python{version}')
    if found and subprocess.run([found,'--version'], capture_output=True).returncode==0: return found
    return next(iter(sorted(Path.home().glob(f'.pyenv/versions/{version}.*/bin/python'))), None)


@pytest.mark.parametrize('version', ['3.12','3.13'])
def test_the_code_compiles(version, tmp_path):
    python = interpreter(version)
    if python is None: pytest.skip(f'no Python {version} on this machine')
    for o in ('mgmt_fast','tests','benchmarks'): shutil.copytree(ROOT/o, tmp_path/o)
    r = subprocess.run([python,'-W','error','-m','compileall','-q',tmp_path], capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
