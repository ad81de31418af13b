"""The built wheel, installed without the pins of development beside the newest fastai and fastcore, and used from
another folder."""
import re
import subprocess
import sys
import sysconfig
import venv

import pytest

TRAIN = """
import importlib, pkgutil, sys
from pathlib import Path
import fastai, fastcore, mgmt_fast
assert Path(mgmt_fast.__file__).is_relative_to(sys.prefix), mgmt_fast.__file__
for m in pkgutil.iter_modules(mgmt_fast.__path__): importlib.import_module(f'mgmt_fast.{m.name}')
from mgmt_fast.all import *
make_phantom('scans', n=16, auc=.95, slices=12, size=48, test=0., sequences=('T1wCE',), progress=False, n_workers=0)
store = prepare(kaggle_cohort('scans'), 'store', 'T1wCE', size=(12,32,32), progress=False, n_workers=1)
learn = mgmt_learner(mgmt_dls(store, bs=8, augs=mgmt_augs()), 'resnet10', get_recipe('default', epochs=1), path='run')
with learn.no_bar(): learn.fit_recipe()
save_mgmt(learn, 'model')
assert predict('model', store, progress=False).prob.between(0,1).all()
print('fastai', fastai.__version__, 'fastcore', fastcore.__version__)
"""


@pytest.mark.newest
def test_imports_and_trains_on_the_newest_stack(wheel_file, tmp_path):
    "Heavy packages come from the environment of the tests; what is upgraded lies before them."
    venv.create(tmp_path/'env', with_pip=False)
    python = tmp_path/'env/bin/python'
    site = subprocess.run([python,'-c','import sysconfig; print(sysconfig.get_paths()["purelib"])'],
        capture_output=True, text=True, check=True).stdout.strip()
    with open(f'{site}/shared.pth','w') as f: f.write(sysconfig.get_paths()['purelib'])

    def pip(*args):
        return subprocess.run([sys.executable,'-m','pip','--python',python,'install','--quiet',
            '--disable-pip-version-check',*map(str,args)], capture_output=True, text=True, timeout=600)
    r = pip('--upgrade', 'fastai', 'fastcore', 'fasttransform', 'fastprogress')
    if r.returncode and re.search('No matching distribution|Connection|Max retries|Temporary failure|timed out',
        r.stderr):
        pytest.skip(f'the newest packages cannot be had here: {r.stderr.strip().splitlines()[-1]}')
    assert r.returncode==0, r.stderr
    r = pip('--no-deps', '--force-reinstall', wheel_file)
    assert r.returncode==0, r.stderr
    r = subprocess.run([python,'-c',TRAIN], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={'PATH':'/usr/bin:/bin','OMP_NUM_THREADS':'1','MPLBACKEND':'Agg'})
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
    fastcore = r.stdout.split()[-1]
    assert int(fastcore.split('.')[0])>=2, r.stdout
    r = subprocess.run([tmp_path/'env/bin/mgmt_predict','--help'], cwd=tmp_path, capture_output=True, text=True,
        timeout=300)
    assert r.returncode==0 and 'usage: mgmt_predict' in r.stdout, r.stderr
