"Prediction goes on: what fails on one patient is that patient's note."
import os
import signal

import pytest
import torch

from mgmt_fast import learner
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, fault_log, get_recipe
from mgmt_fast.learner import MGMTModel, predict
from mgmt_fast.networks import create_network
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

ARCH = 'timm/resnet10t'
RECIPE = get_recipe('default', size=(8,32,32), arch=ARCH)
VICTIM = '00003'


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return MGMTModel(create_network(arch=ARCH, in_chans=1, anisotropic=2).eval(), RECIPE, ('FLAIR',))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp('phantom')/'cohort'
    make_phantom(root, n=10, test=0, slices=8, size=32, sequences=('FLAIR',), progress=False)
    return kaggle_cohort(root)


def check_others(res, whole):
    "All but the victim are as without it."
    assert res.patient.tolist()==whole.patient.tolist()
    bad = res.patient==VICTIM
    assert res.prob[bad].isna().all() and res[~bad].equals(whole[~bad])
    return res.note[bad].item()


@pytest.mark.parametrize('raised,says', [
    (RuntimeError('secret'), 'a fault of this library while predicting (RuntimeError)'),
    (MGMTError('the age is missing'), 'the age is missing')])
@pytest.mark.parametrize('kind', ['scans','store'])
def test_what_the_model_raises_is_a_note(model, cohort, tmp_path, monkeypatch, raised, says, kind):
    monkeypatch.setenv('MGMT_FAST_LOG', str(tmp_path/'faults.log'))
    if kind=='store': cohort = prepare(cohort, tmp_path/'store', ('FLAIR',), recipe=RECIPE, n_workers=1, progress=False)
    whole,logit = predict(model, cohort, n_workers=1, progress=False),MGMTModel.logit

    def fails(self, volumes, row):
        if row['patient']==VICTIM: raise raised
        return logit(self, volumes, row)

    monkeypatch.setattr(MGMTModel, 'logit', fails)
    note = check_others(predict(model, cohort, n_workers=1, progress=False), whole)
    assert says in note and 'secret' not in note
    assert fault_log().exists()==isinstance(raised, RuntimeError)


@pytest.mark.skipif(os.name!='posix', reason='workers are forked')
@pytest.mark.parametrize('n_workers', [1,2])
def test_a_process_that_dies_costs_one_patient(model, cohort, monkeypatch, n_workers):
    whole,prepare_patient = predict(model, cohort, n_workers=1, progress=False),learner.prepare_patient

    def dies(row, *args):
        if row['patient']==VICTIM: os.kill(os.getpid(), signal.SIGKILL)
        return prepare_patient(row, *args)

    monkeypatch.setattr(learner, 'prepare_patient', dies)
    note = check_others(predict(model, cohort, n_workers=n_workers, progress=False), whole)
    assert 'the process that prepared it died' in note
