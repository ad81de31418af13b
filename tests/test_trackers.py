"A run's recipe, curves, figures and report reach TensorBoard and MLflow."
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mgmt_fast.core import MGMTError, get_recipe, save_recipe
from mgmt_fast.report import write_report
from mgmt_fast.trackers import run_parts, to_mlflow, to_tensorboard


@pytest.fixture
def folder(tmp_path):
    "What `cross_validate` and its report leave, with two runs"
    d = tmp_path/'study'
    for i in range(2):
        (d/'runs'/f'run{i}').mkdir(parents=True)
        t = pd.DataFrame(dict(epoch=[0,1], train_loss=[.7,.6], valid_loss=[.8,.5+i/10], auc=[.5,.9], time=['00:01']*2))
        t.to_csv(d/'runs'/f'run{i}'/'history.csv', index=False)
    (d/'figures').mkdir()
    Image.fromarray(np.full((8,12,3), 200, np.uint8)).save(d/'figures'/'roc.png')
    save_recipe(get_recipe('default', lr=.002), d/'recipe.yaml')
    write_report(d/'report.html', 'A study', dict(Results=pd.DataFrame(dict(auc=[.75]))))
    return d


def test_what_is_read(folder, tmp_path):
    parts = run_parts(folder)
    assert parts.recipe['lr']==.002 and parts.recipe['recipe']=='default'
    assert list(parts.curves)==['run0','run1'] and list(parts.curves['run0'])==['train_loss','valid_loss','auc']
    with pytest.raises(MGMTError, match='nothing of a run'): run_parts(tmp_path)


def test_tensorboard(folder):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator(str(to_tensorboard(folder)))
    seen.Reload()
    assert [e.value for e in seen.Scalars('run1/valid_loss')]==pytest.approx([.8,.6])
    assert seen.Tags()['images']==['roc']
    texts = {k: seen.Tensors(k)[0].tensor_proto.string_val[0].decode() for k in seen.Tags()['tensors']}
    assert '| lr | 0.002 |' in texts['recipe/text_summary']
    assert '0.750' in texts['report/text_summary'] and '<img' not in texts['report/text_summary']


def test_mlflow(folder, tmp_path):
    tracking = pytest.importorskip('mlflow.tracking', reason='mlflow is not installed: `pip install mlflow-skinny`')
    ids = [to_mlflow(folder, tmp_path/'mlruns', name=f'look {i}') for i in range(2)]
    client = tracking.MlflowClient(tracking_uri=(tmp_path/'mlruns').as_uri())
    found = client.search_runs([client.get_experiment_by_name('mgmt_fast').experiment_id])
    assert {o.info.run_id for o in found}==set(ids) and {o.info.status for o in found}=={'FINISHED'}
    assert found[0].data.params['lr']=='0.002'
    curve = client.get_metric_history(ids[0], 'run1/valid_loss')
    assert [(o.step, o.value) for o in curve]==[(0,.8), (1,.6)]
    assert {o.path for o in client.list_artifacts(ids[0])}=={'figures','report.html'}


def test_a_tracker_that_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlflow.tracking', None)
    with pytest.raises(MGMTError, match='pip install mlflow'): to_mlflow(folder, tmp_path)
