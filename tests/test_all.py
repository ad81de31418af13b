"`mgmt_fast.all` beside fastai: what a workflow needs, and no name that means another thing there."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mgmt_fast.all as ours

SHORT = {'Path', 'plt', 'np', 'pd', 'torch'}


def test_about_sixty_names():
    assert 50<=len(set(ours.__all__)-SHORT)<=75


def test_no_name_is_another_thing_in_fastai():
    import fastai.vision.all as theirs
    other = [k for k in ours.__all__ if hasattr(theirs, k) and getattr(theirs, k) is not getattr(ours, k)]
    assert other==['GradientAccumulation']


def test_both_orders_of_import():
    "After fastai ours win; before it, only `GradientAccumulation` is fastai's."
    code = ('from {} import *\nfrom {} import *\nimport mgmt_fast.all as m\n'
        'print([k for k in m.__all__ if globals()[k] is not getattr(m, k)])')
    def run(*modules): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code.format(*modules)],
        capture_output=True, text=True, check=True).stdout.strip()
    assert run('fastai.vision.all', 'mgmt_fast.all')=='[]'
    assert run('mgmt_fast.all', 'fastai.vision.all')=="['GradientAccumulation']"


def test_names_of_version_01_are_found_with_a_warning():
    with pytest.warns(DeprecationWarning, match='from mgmt_fast.metrics import holm'): assert ours.holm
    with pytest.warns(DeprecationWarning, match='from mgmt_fast.operators import as_images'): assert ours.fold
    with pytest.raises(AttributeError, match='nonsense'): ours.nonsense


def test_no_builtin_is_hidden_by_fastai():
    "Then a notebook that imports fastai first can only differ by names that it does not import itself"
    import builtins

    import fastai.vision.all as theirs
    exported = getattr(theirs, '__all__', None) or [k for k in vars(theirs) if not k.startswith('_')]
    assert not [k for k in exported if hasattr(builtins, k) and getattr(theirs, k) is not getattr(builtins, k)]


def test_the_wrong_order_of_imports_fails_loudly():
    "fastai's `GradientAccumulation` counts samples and takes a number first; ours takes names only"
    from fastai.callback.training import GradientAccumulation as theirs
    with pytest.raises(TypeError): theirs(n_batches=4)
    with pytest.raises(TypeError): ours.GradientAccumulation(32)


NOTEBOOKS = sorted(p for p in (Path(__file__).parent.parent/'nbs').glob('*.ipynb'))


def run_after_fastai(path, tmp_path):
    "What a notebook says when fastai was imported with a star before its first cell; '' if it runs"
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']
    marks = re.compile(r'^#\|\s*(real|slow|cuda|eval: false)', re.M)
    cells = [o for o in cells if not marks.search(o) and 'nbdev_export' not in o and 'default_exp' not in o]
    code = '\n'.join(f'_shell.run_cell({o!r}).raise_error()' for o in ['from fastai.vision.all import *', *cells])
    start = 'from IPython.core.interactiveshell import InteractiveShell\n_shell = InteractiveShell.instance()\n'
    script = tmp_path/'run.py'
    script.write_text(start+code)
    r = subprocess.run([sys.executable, '-W', 'ignore', script], cwd=path.parent, capture_output=True, text=True,
        env=dict(os.environ, MPLBACKEND='Agg', PYTHONPATH=str(path.parent.parent)))
    return '' if r.returncode==0 else r.stdout[-1500:]+r.stderr[-1500:]


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem=='tutorial_predictions'], ids=lambda p: p.stem)
def test_a_tutorial_runs_after_fastai(path, tmp_path): assert not run_after_fastai(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_runs_after_fastai(path, tmp_path): assert not run_after_fastai(path, tmp_path)
