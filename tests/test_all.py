"`mgmt_fast.all` beside fastai: what a workflow needs, and no name that means another thing there."
import subprocess
import sys

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
