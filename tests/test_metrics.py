"Metrics beside pROC, statsmodels, scikit-learn and first principles, and what they refuse."
import importlib, json, sys
from dataclasses import FrozenInstanceError, asdict
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings, strategies as st
from scipy.special import expit, logit, rel_entr
from scipy.stats import norm

from mgmt_fast.core import MGMTError, rng_for
from mgmt_fast.metrics import *

PROC = json.loads((Path(__file__).parent/'proc.json').read_text())['sets']
REPORTS = dict(auc_ci=auc_ci, boot=lambda y,p: auc_ci(y,p,'bootstrap'), newcombe=lambda y,p: auc_ci(y,p,'newcombe'),
    permutation=permutation_test,
    delong_first=lambda y,p: delong_test(y,p,np.random.random(len(p))),
    delong_second=lambda y,p: delong_test(y,np.random.random(len(y)),p),
    compare=lambda y,p: compare_models(y,dict(a=p,b=np.random.random(len(p)))))
PROBS = dict(classification=classification_ci, reliability=reliability, calibration=calibration,
    temperature=fit_temperature, decision=decision_curve)


def study(n=117, auc=.7, seed=0, share=.5):
    rng = rng_for(seed,'study')
    y = rng.random(n)<share
    return y, expit(rng.normal(size=n)+y*np.sqrt(2)*norm.ppf(auc))


@pytest.mark.parametrize('name', PROC)
def test_delong_is_that_of_proc(name):
    d,f = ({k: np.array(v) for k,v in PROC[name]['data'].items()},PROC[name]['figures'])
    aucs,cov = delong_cov(d['y']==1, d['a'], d['b'])
    for i,k in enumerate('ab'):
        assert len(set(d[k]))<len(d[k]), 'the fixture is there for its ties'
        r,r90 = auc_ci(d['y'],d[k],'delong'),auc_ci(d['y'],d[k],'delong',level=.9)
        np.testing.assert_allclose([aucs[i],cov[i,i],r.auc,r.lo,r.hi,r90.lo,r90.hi],
            [f[k]['auc'],f[k]['var'],f[k]['auc'],*f[k]['ci'],*f[k]['ci90']], atol=1e-9)
    np.testing.assert_allclose(cov[0,1], f['cov'], atol=1e-9)
    r = delong_test(d['y'], d['a'], d['b'])
    np.testing.assert_allclose([r.z,r.p,r.lo,r.hi], [f['paired']['z'],f['paired']['p'],*f['paired']['ci']], atol=1e-9)
    np.testing.assert_allclose(delong_test(d['y'],d['a'],d['b'],y2=d['y']).z, f['unpaired']['z'], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0,4), st.integers(0,4)), min_size=10, max_size=30))
def test_delong_from_first_principles(rows):
    "Every pair counted, and the components averaged pair by pair"
    y,a,b = (np.array(o) for o in zip(*rows))
    if min(y.sum(),(~y).sum())<2: return
    kernels = [(p[y][:,None]>p[~y])+.5*(p[y][:,None]==p[~y]) for p in (a,b)]
    aucs,cov = delong_cov(y, a, b)
    np.testing.assert_allclose(aucs, [k.mean() for k in kernels])
    want = np.cov([k.mean(1) for k in kernels])/y.sum()+np.cov([k.mean(0) for k in kernels])/(~y).sum()
    np.testing.assert_allclose(cov, want, atol=1e-12)


def test_clusters():
    "Scans of one patient that agree add nothing; a cluster may hold both classes; order and names do not matter"
    y,p = study()
    q = study(seed=1)[1]
    who = np.repeat(np.arange(117), 3)
    for a,b in ((auc_ci(np.repeat(y,3),np.repeat(p,3),cluster=who), auc_ci(y,p)),
        (delong_test(np.repeat(y,3),np.repeat(p,3),np.repeat(q,3),cluster=who), delong_test(y,p,q))):
        np.testing.assert_allclose(a, b)
    assert np.ptp(auc_ci(np.repeat(y,3),np.repeat(p,3))[['lo','hi']])<.7*np.ptp(auc_ci(y,p)[['lo','hi']])
    mixed,at = rng_for(0,'mix').integers(0, 40, 117),rng_for(0,'order').permutation(117)
    np.testing.assert_allclose(auc_ci(y,p,cluster=mixed), auc_ci(y[at],p[at],cluster=[f'p{o}' for o in mixed[at]]))


def test_clusters_cover():
    """Patients with one to four scans that share their luck: the interval that knows it holds what it promises, the
    other does not"""
    held = []
    for i in range(600):
        rng = rng_for(i,'clusters')
        n = 80; who = np.repeat(np.arange(n), rng.integers(1, 5, n))
        label = rng.random(n)<.5
        y = label[who]
        p = rng.normal(size=n)[who]*.9**.5+rng.normal(size=len(who))*.1**.5+y*np.sqrt(2)*norm.ppf(.7)
        held.append([r.lo<=.7<=r.hi for r in (auc_ci(y,p,cluster=who),auc_ci(y,p))])
    clustered,blind = np.mean(held, axis=0)
    assert .92<clustered<.975 and blind<.88


def coverage():
    "The benchmark as a module, and the map that it wrote"
    home = Path(__file__).parent.parent/'benchmarks'
    sys.path.insert(0, str(home))
    try: module = importlib.import_module('coverage')
    finally: sys.path.remove(str(home))
    return module,pd.read_csv(home/'coverage.csv')


def test_the_map_was_made_of_these_intervals():
    "What the benchmark judges, many studies at once, is what `auc_ci` gives for each, perfect and tied ones too"
    bench,_ = coverage()
    rng = rng_for(0, 'map')
    for auc,m,n,scores in ((.7,20,30,'SD 2'),(.99,6,9,'SD 1'),(.8,5,45,'five levels'),(.5,12,12,'SD 0.5')):
        _,pos,neg = bench.draw(auc, m, n, scores, 12, rng)
        found = bench.closed_forms(*bench.placements(pos, neg))
        y = np.arange(m+n)<m
        for i,p in enumerate(np.c_[pos,neg]*1.):
            for k in ('mee','delong','newcombe'):
                np.testing.assert_allclose([o[i] for o in found[k]], auc_ci(y,p,k)[['lo','hi']], atol=1e-6)


def test_the_default_is_what_the_rule_chooses():
    bench,t = coverage()
    s = bench.summary(t)
    assert len(t)==len(bench.cells()) and s.index[s.passes][0]==auc_ci(*study()).name=='mee'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0,5)), min_size=10, max_size=40))
def test_the_default_interval_keeps_the_laws(rows):
    "It holds the AUC, has a width, grows with the level, turns round with the labels, and asks for ranks only"
    y,p = (np.array(o) for o in zip(*rows))
    if min(y.sum(),(~y).sum())<2 or p.min()==p.max(): return
    r,wide,back = auc_ci(y,p),auc_ci(y,p,level=.99),auc_ci(~y,p)
    assert 0<=wide.lo<=r.lo<=r.auc<=r.hi<=wide.hi<=1 and r.hi-r.lo>.01
    assert r.name==('mee' if min(y.sum(),(~y).sum())>=5 else 'bound')
    np.testing.assert_allclose(back, 1-r[['auc','hi','lo']], atol=1e-9)
    np.testing.assert_allclose(auc_ci(y,np.exp(p)), r)
    np.testing.assert_allclose(auc_interval(y, [p,3.*p+1]), r)


def test_a_large_study_has_delongs_interval():
    y,p = study(40000)
    np.testing.assert_allclose(auc_ci(y,p), auc_ci(y,p,'delong'), atol=2e-4)
    np.testing.assert_allclose(auc_ci(y,p,'newcombe'), auc_ci(y,p), atol=2e-3)


def test_few_patients_of_a_class_get_a_bound_that_holds():
    "Hoeffding's ends are where its chance is used up; scores of 0 and 1 come nearest to it and stay inside"
    for auc,m in ((.8,4),(1.,2),(0.,3),(.5,7)):
        r = hoeffding_ci(auc, m, .9)
        ends = [o for o in (r.lo,r.hi) if 0<o<1]
        np.testing.assert_allclose([m*sum(rel_entr([auc,1-auc],[o,1-o])) for o in ends], np.log(20), rtol=1e-6)
    rng,y,held = rng_for(0,'bound'),np.arange(24)<4,[]
    for _ in range(2000):
        p = np.where(y, rng.random(24)<.8, .5)
        if p.min()<p.max(): r = auc_ci(y, p+0.); held.append(r.lo<=.8<=r.hi)
    assert np.mean(held)>=.95 and r.name=='bound'
    who = np.tile(np.arange(24), 2)
    with pytest.raises(MGMTError, match='5 patients of each class; received 4 and 20'): auc_ci(y, who[:24], 'mee')
    with pytest.raises(MGMTError, match='average each patient'): auc_ci(np.tile(y,2), np.arange(48), cluster=who)


def test_bootstrap_is_a_resampling_within_classes():
    y,p = study(40)
    p,rng = p.round(1),rng_for(0,'naive')
    naive = [delong_parts(np.r_[np.ones(y.sum(),bool),np.zeros((~y).sum(),bool)],
        np.r_[rng.choice(p[y],y.sum()),rng.choice(p[~y],(~y).sum())])[0] for _ in range(4000)]
    r = auc_ci(y, p, 'bootstrap', n_boot=8000)
    np.testing.assert_allclose([r.lo,r.hi], np.quantile(naive,[.025,.975]), atol=.015)
    assert auc_ci(y,p,'bootstrap',seed=3).equals(auc_ci(y,p,'bootstrap',seed=3))


def test_permutation_is_exact_on_few_patients():
    "All 252 ways to deal out five labels of ten, counted"
    y,p = np.arange(10)<5,np.array([.9,.8,.7,.4,.6,.5,.3,.2,.4,.1])
    every = [delong_parts(np.array(o,bool),p)[0] for o in product((0,1),repeat=10) if sum(o)==5]
    auc = delong_parts(y,p)[0]
    r = permutation_test(y, p, alternative='greater')
    np.testing.assert_allclose([r.auc,r.delta,r.p], [auc,auc-.5,np.mean(np.array(every)>=auc-1e-12)])
    np.testing.assert_allclose(permutation_test(y,p).p, 2*r.p)


def test_permutation_agrees_with_delong_and_is_antisymmetric():
    y,p = study(200)
    q = expit(logit(p)*.5+rng_for(1,'q').normal(size=200))
    r,back,want = permutation_test(y,p,q),permutation_test(y,q,p),delong_test(y,p,q)
    assert abs(r.p-want.p)<.03 and np.isclose(r.delta,want.delta)
    assert np.isclose(back.delta,-r.delta) and abs(back.p-r.p)<.02
    assert permutation_test(y,p,np.exp(p)).p==1


def test_holm():
    np.testing.assert_allclose(holm([.01,.04,.03]), [.03,.06,.06])
    y,p = study()
    t = compare_models(y, pd.DataFrame({k: study(seed=k)[1] for k in range(4)}))
    assert len(t)==6 and (t.p_holm>=t.p).all()
    assert {'model1','model2','auc1','auc2','z','p','delta','lo','hi','p_holm'}<=set(t)


def test_wilson_and_bootstrap_agree_where_both_hold():
    y,p = study(2000)
    w,b = classification_ci(y,p),classification_ci(y,p,method='bootstrap')
    np.testing.assert_allclose(w, b, atol=.006)
    assert ((w.lo<=w.value)&(w.value<=w.hi)).all() and classification_ci(y,p).equals(w)
    np.testing.assert_allclose(w.lo.accuracy, sm.stats.proportion_confint(w.value.accuracy*2000, 2000, method='wilson')[
        0])


def test_the_other_class_turns_the_table_round():
    y,p = study()
    a,b = classification_ci(y,p,.4).value,classification_ci(~y,1-p,.6-1e-12).value
    for k,j in dict(accuracy='accuracy', sensitivity='specificity', ppv='npv', mcc='mcc').items():
        np.testing.assert_allclose([a[k],a[j]], [b[j],b[k]])


def test_calibration_is_that_of_statsmodels():
    y,p = study(300)
    t,x = calibration(y,p),logit(p)
    joint = sm.GLM(y.astype(float), sm.add_constant(x), family=sm.families.Binomial()).fit()
    large = sm.GLM(y.astype(float), np.ones(300), family=sm.families.Binomial(), offset=x).fit()
    np.testing.assert_allclose(t.loc['slope',['value','lo','hi']].astype(float), [joint.params[1],*joint.conf_int()[1]],
        atol=1e-5)
    np.testing.assert_allclose(t.loc['intercept',['value','lo','hi']].astype(float),
        [large.params[0],*large.conf_int()[0]], atol=1e-5)


def test_calibration_of_perfect_models_raises_no_alarm():
    "p is uniform, so 5 % lie below .05; the ECE is what `calibrated` says, on the average"
    ps,gap = [],[]
    for i in range(200):
        rng = rng_for(i,'perfect'); p = expit(rng.normal(size=117))
        t = calibration(rng.random(117)<p, p, n_sim=100, seed=i)
        ps.append(t.p); gap.append(t.value.ece-t.calibrated.ece)
    assert (np.abs((np.array(ps)<.05).mean(0)-.05)<.05).all()
    assert abs(np.mean(gap))<4*np.std(gap)/200**.5


def test_probabilities_of_exactly_0_and_1_are_taken():
    y,p = study()
    t = calibration(y, np.where(p>.9,1,np.where(p<.1,0,p)))
    assert np.isfinite(t.value).all() and t.value.log_loss<20


def test_temperature():
    y,p = study(4000)
    for t in (.5,3.): assert np.isclose(fit_temperature(y, expit(logit(p)*t)).t, t*fit_temperature(y,p).t, rtol=1e-3)
    t = fit_temperature(y, p)
    assert calibration(y,t(p),n_sim=10).value.log_loss<=calibration(y,p,n_sim=10).value.log_loss+1e-12
    assert Temperature(**json.loads(json.dumps(asdict(t))))==t
    with pytest.raises(FrozenInstanceError): t.t = 1.
    with pytest.raises(MGMTError, match='positive'): Temperature(0., 1)


@pytest.mark.parametrize('name', sorted((REPORTS|PROBS).keys()-{
    'compare'})) # whose table names the patients once for all
def test_what_names_its_patients_is_paired_by_name(name):
    "Whatever the order, and whatever zeros the ids have lost."
    y,p = study(40)
    def f(y, p):
        np.random.seed(0) # of the other model that some of these compare with
        return (REPORTS|PROBS)[name](y, p)
    ids = pd.Index([f'{i:05d}' for i in range(40)], name='patient')
    y,p = pd.Series(y.astype(float), index=ids),pd.Series(p, index=ids)
    lost = pd.Series(p.to_numpy(), index=pd.Index(range(40), name='patient'))
    want = f(y.to_numpy(), p.to_numpy())
    for other in (p[::-1], lost.sample(frac=1, random_state=1), p.sample(frac=1, random_state=2)):
        got = f(y, other)
        for a,b in zip(*(list(o.items()) if isinstance(o, pd.Series) else [(0, np.asarray(o, dtype=object).tolist())]
            for o in (want, got))):
            assert str(a)==str(b)


@pytest.mark.parametrize('name', REPORTS|PROBS)
@pytest.mark.parametrize('case,match', dict(few='too few', one='both classes', nearly='two patients of each class',
    constant='tell patients apart', nan='finite', infinite='finite', unmatched='pair up',
    unlabelled='without a label', two='labels must be 0 or 1', text='must be numbers', another='different patients',
    twice='several times').items())
def test_no_figure_from_bad_input(name, case, match):
    y,p = study(40); y = y.astype(float)
    if case=='few': y,p = y[:9],p[:9]
    if case=='one': y[:] = 1
    if case=='nearly': y[:] = 0; y[3] = 1
    if case=='constant': p[:] = .3
    if case=='nan': p[3] = np.nan
    if case=='infinite': p[3] = np.inf
    if case=='unmatched': p = p[1:]
    if case=='unlabelled': y[3] = np.nan
    if case=='two': y[3] = 2
    if case=='text': p = np.array(['high']*40)
    if case in ('another','twice'):
        y,p = (pd.Series(o, index=pd.Index([f'{i:05d}' for i in range(40)], name='patient')) for o in (y,p))
    if case=='another': p = p.rename({'00007':'00077'})
    if case=='twice': y,p = (o.rename({'00003':'00002'}) for o in (y,p))
    with pytest.raises(MGMTError, match=match): (REPORTS|PROBS)[name](y, p)


@pytest.mark.parametrize('name', PROBS)
def test_scores_are_not_probabilities(name):
    y,p = study()
    with pytest.raises(MGMTError, match=r'must lie in \[0,1\]'): PROBS[name](y, logit(p))


@pytest.mark.parametrize('call', [lambda y,p: auc_ci(y,p,'wald'), lambda y,p: auc_ci(y,p,'bootstrap',cluster=y),
    lambda y,p: auc_ci(y,p,cluster=y[1:]), lambda y,p: auc_ci(y,p,cluster=y),
    lambda y,p: delong_test(y,p,1-p,y2=y,cluster=y), lambda y,p: classification_ci(y,p,threshold=1.5),
    lambda y,p: classification_ci(y,p,method='exact'), lambda y,p: reliability(y,p,strategy='equal'),
    lambda y,p: decision_curve(y,p,[0.]), lambda y,p: compare_models(y,dict(a=p)),
    lambda y,p: delong_test(y,y*1.,1.-y)])
def test_bad_choices_are_refused(call):
    with pytest.raises(MGMTError): call(*study())


def test_fastai_metric_survives_what_training_brings():
    import torch
    y,p = study()
    yt,pt = torch.tensor(y).float(),torch.tensor(logit(p))
    np.testing.assert_allclose(AUC()(pt,yt), auc_ci(y,p).auc)
    for a,b in ((pt*0,yt),(pt,yt*0),(pt*np.nan,yt),(pt[:1],yt[:1])): assert np.isnan(AUC()(a,b))
