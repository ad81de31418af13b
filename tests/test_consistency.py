"Bounds on printed figures: no scores go past them, some reach them, and tables are judged by them."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from mgmt_fast.consistency import *
from mgmt_fast.core import MGMTError, rng_for
from mgmt_fast.metrics import auc_ci, auc_se


def measure(y, p, at):
    call = p>=at
    return dict(accuracy=np.mean(call==y), sensitivity=call[y].mean(), specificity=(~call[~y]).mean(),
        auc=roc_auc_score(y,p), loss=log_loss(y,p), minority=min(y.mean(),1-y.mean()), n=len(y))


studies = st.lists(st.tuples(st.booleans(), st.integers(1,19)), min_size=2,
    max_size=40).filter(lambda o: len({a for a,_ in o})==2)


@settings(max_examples=80, deadline=None)
@given(studies, st.integers(1,19), st.sampled_from([2,3,4,9]))
def test_what_was_measured_is_never_called_impossible(rows, at, digits):
    "Whatever the scores, the threshold and the rounding; known balance or not"
    y,p = (np.array(o) for o in zip(*rows))
    r = pd.DataFrame([measure(y, p/20, at/20)]).round(digits)
    for t in (r,r.drop(columns='minority'),r.drop(columns=['minority','n'])):
        assert 'impossible' not in set(check_consistency(t, threshold=at/20).verdict)


@pytest.mark.parametrize('m,n,hit', [(20,80,15),(30,70,0),(50,50,50),(1,9,1)])
def test_auc_bound_by_accuracy_is_reached_and_one_step_below_is_caught(m, n, hit):
    y = np.arange(m+n)<m
    r = measure(y, np.r_[[.9]*hit,[.1]*(m-hit),[.3]*n], .5)
    np.testing.assert_allclose(r['auc'], auc_bounds_at(r['accuracy'],r['minority'])[0], atol=1e-12)
    t = pd.DataFrame([{k: r[k] for k in ('accuracy','auc','minority')}])
    assert not len(check_consistency(t))
    if hit:
        found = check_consistency(t.assign(auc=t.auc-.08))
        assert found.verdict.tolist()==['impossible'] and found.check.tolist()==['auc and accuracy']
        assert check_consistency(t.assign(accuracy=1-t.accuracy, auc=1-t.auc+.08)).verdict.tolist()==['impossible']


@pytest.mark.parametrize('row,check', [(dict(auc=.9,sensitivity=.1,specificity=.2),'auc and sensitivity'),
    (dict(auc=.5,sensitivity=.8,specificity=.8),'auc and sensitivity'),
    (dict(accuracy=.9,sensitivity=.8,specificity=.7),'accuracy and sensitivity'),
    (dict(accuracy=.75,sensitivity=.9,specificity=.5,minority=.1),'accuracy and sensitivity'),
    (dict(accuracy=.6,loss=.2),'loss and accuracy'), (dict(accuracy=1.,loss=.8,n=50),'loss and accuracy'),
    (dict(auc=1.2),'range'), (dict(loss=-.1),'range'), (dict(accuracy=.99,auc=.6,n=20),'auc and accuracy')])
def test_impossible_rows(row, check):
    found = check_consistency([row])
    assert found.verdict.tolist()==['impossible'] and found.check.tolist()==[check]


def test_unknown_balance_gives_conditions():
    found = check_consistency(pd.DataFrame([dict(accuracy=.95,auc=.7),dict(accuracy=.8,sensitivity=.9,specificity=.6),
        dict(accuracy=1.,loss=.8)]))
    assert set(found.verdict)=={'condition'} and '18.64%' in found.finding[0]
    assert '66.67%' in found.finding[1] and 'patients' in found.finding[2]
    known = check_consistency([dict(accuracy=.95,auc=.7)], minority=.15)
    assert not len(known) and check_consistency([dict(accuracy=.95,auc=.7)], minority=.3).verdict.item()=='impossible'


def test_bounds_survive_averages():
    "Accuracy, AUC and loss averaged over models on the same patients"
    rng = rng_for(0,'averages'); y = np.arange(60)<20
    rows = [pd.DataFrame([measure(y, rng.random(60), rng.random()) for _ in range(5)])[
        ['accuracy','auc','minority','n']].mean() for _ in range(100)]
    assert 'impossible' not in set(check_consistency(pd.DataFrame(rows)).verdict)


three = st.lists(st.integers(1,19), min_size=3, max_size=3)
several = st.lists(st.tuples(st.booleans(), three), min_size=2, max_size=30)


@settings(max_examples=80, deadline=None)
@given(several.filter(lambda o: len({a for a,_ in o})==2), three)
def test_the_mean_of_models_is_never_called_impossible(rows, at):
    "Each model at a threshold of its own, on the same patients; of a table that says how many models it averages"
    y,P = np.array([o for o,_ in rows]),np.array([o for _,o in rows]).T
    mean = pd.DataFrame([measure(y, p/20, t/20) for p,t in zip(P,at)]).mean().to_frame().T
    far = max((o/20 for o in at), key=lambda t: abs(t-.5))
    assert 'impossible' not in set(check_consistency(mean.assign(runs=3, threshold=far)).verdict)


@settings(max_examples=80, deadline=None)
@given(several.filter(lambda o: len({a for a,_ in o})==2), st.lists(st.integers(1,19), min_size=2, max_size=2))
def test_folds_with_a_threshold_each_are_never_called_impossible(rows, at):
    "The calls of each fold at its own threshold; the AUC of all folds pooled"
    y,p = np.array([o for o,_ in rows]),np.array([o[0] for _,o in rows])/20
    cut = np.array(at)[[o[1]%2 for _,o in rows]]/20
    r = measure(y, p, cut)
    far = max(at, key=lambda t: abs(t-10))/20
    t = pd.DataFrame([r]).assign(thresholds=2, threshold=far)
    assert 'impossible' not in set(check_consistency(t).verdict)
    assert not set(check_consistency(t.assign(accuracy=.99, sensitivity=.5, specificity=.5)).verdict)<={'condition'}


def test_equal_rows_and_external_above_validation():
    rows = [dict(model='a',set='validation',auc=.61,accuracy=.6,n=117),
        dict(model='b',set='validation',auc=.6,accuracy=.55,n=117),
        dict(model='b',set='TCGA',auc=.64,accuracy=.52,n=262)]
    assert not len(check_consistency(rows))
    found = check_consistency(rows+[dict(model='c',set='validation',auc=.61,accuracy=.6,n=117),
        dict(model='a',set='TCGA',auc=.8,accuracy=.5,n=262)])
    assert found.check.tolist()==['equal rows','external above validation'] and set(found.verdict)=={'suspect'}
    assert found['where'][0]=='a, validation = c, validation'


def test_shapes_of_tables():
    tall = pd.DataFrame(dict(model=['a','a'], sequence=['FLAIR','T2w'], accuracy=[99.,50.], auc=[.6,.55]))
    wide = tall.pivot(index='model', columns='sequence', values=['accuracy','auc'])
    for t in (tall, wide, wide.swaplevel(axis=1), tall.set_index(['model','sequence']), tall.rename(columns=str.upper)):
        found = check_consistency(t)
        assert len(found)==1 and found.verdict.item()=='condition' and 'a' in found[
            'where'].item() and 'FLAIR' in found['where'].item(), t
    assert check_consistency(tall.assign(set='test'), minority=dict(test=.4)).verdict.item()=='impossible'


@pytest.mark.parametrize('table,minority', [(dict(model=['a']),None),([],None),(dict(auc=[.5]),.7),(dict(auc=[.5]),0),
    (dict(auc=['high']),None)])
def test_bad_tables_are_refused(table, minority):
    with pytest.raises(MGMTError): check_consistency(table, minority)


def test_standard_error_of_chance_is_exact():
    "Over all orders of five patients"
    from itertools import permutations
    aucs = [roc_auc_score([1,1,0,0,0],o) for o in permutations(range(5))]
    np.testing.assert_allclose(auc_se(.5,2,3), np.std(aucs))


def test_planning():
    assert patients_needed(.6)>patients_needed(.65)>patients_needed(.8)
    assert patients_needed(.65,share=.2)>patients_needed(.65)
    n,rng = patients_needed(.7),rng_for(0,'planning')
    def found():
        y = rng.random(n)<.5
        return auc_ci(y, rng.normal(size=n)+y*2**.5*.5244).lo>.5
    assert abs(np.mean([found() for _ in range(500)])-.8)<.06
    for bad in (dict(auc=.5),dict(auc=1.),dict(auc=.7,power=1.),dict(auc=.7,share=0.)):
        with pytest.raises(MGMTError): patients_needed(**bad)
