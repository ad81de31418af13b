"Marks and fixtures that all tests share."
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DATA = os.environ.get('MGMT_FAST_DATA')


def pytest_configure(config):
    os.environ['MGMT_FAST_HOME'] = tempfile.mkdtemp(prefix='mgmt-fast-home') # for fixtures that serve several tests
    for mark,why in dict(real='needs the real scans that MGMT_FAST_DATA points to', slow='takes minutes',
        cuda='needs a GPU', newest='installs the newest fastai and fastcore into an environment of its own').items():
        config.addinivalue_line('markers', f'{mark}: {why}')


def pytest_collection_modifyitems(items):
    import torch
    for item in items:
        if 'real' in item.keywords and not DATA:
            item.add_marker(pytest.mark.skip(reason='real scans: set MGMT_FAST_DATA to their folder'))
        if 'cuda' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no GPU here'))
        if 'slow' in item.keywords and not os.environ.get('MGMT_FAST_SLOW'):
            item.add_marker(pytest.mark.skip(reason='slow: set MGMT_FAST_SLOW=1 to run'))


def pytest_unconfigure(config): shutil.rmtree(os.environ['MGMT_FAST_HOME'], ignore_errors=True)


@pytest.fixture(autouse=True)
def user_home(tmp_path, monkeypatch):
    "Each test has a data folder of its own, so that no test cohort is known from another test."
    monkeypatch.setenv('MGMT_FAST_HOME', str(tmp_path/'user-home'))
    return tmp_path/'user-home'


@pytest.fixture(autouse=True)
def said_anew():
    "What is said once per process is said in each test that asks for it, whichever ran before."
    from mgmt_fast.core import say_once
    say_once.cache_clear()


@pytest.fixture
def data():
    "The folder of real scans."
    return Path(DATA)


@pytest.fixture(scope='session')
def wheel_file(tmp_path_factory):
    "A wheel built from a copy, so that the tree stays as it is."
    root,src = Path(__file__).resolve().parent.parent,tmp_path_factory.mktemp('src')
    for o in ('settings.ini','setup.py','README.md','LICENSE'): shutil.copy(root/o, src)
    for o in ('mgmt_fast','nbs','tests'): shutil.copytree(root/o, src/o, ignore=shutil.ignore_patterns('__pycache__'))
    r = subprocess.run([sys.executable,'-m','pip','wheel','--no-build-isolation','--no-deps','--no-index','-q','-w',
        str(src/'out'),str(src)], capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stdout+r.stderr
    return next((src/'out').glob('*.whl'))
