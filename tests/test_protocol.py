"What someone who wants a high number may try: each attempt is refused, counted or set aside."
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from mgmt_fast import external, records
from mgmt_fast.backbones import create_backbone
from mgmt_fast.bundle import Bundle, freeze_bundle
from mgmt_fast.cli import mgmt_external, mgmt_preregister
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, rng_for, write_json
from mgmt_fast.evaluate import cross_validate
from mgmt_fast.external import external_table, external_test, preregister, read_result
from mgmt_fast.fusion import fuse, out_of_fold
from mgmt_fast.learner import MGMTModel, load_model, predict, recipe_dls, save_model
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.records import CohortRecord, ProtocolError, held_out_file, locked, signed
from mgmt_fast.seen import PrintNull, SeenVolumes, find_seen
from mgmt_fast.sweep import search, sweep, sweep_table

SIZE,ARCH = (8,24,24),'timm/test_resnet'
RECIPE = get_recipe('default', arch=ARCH, size=SIZE, anisotropic=2)


def scans(dest, n, first, seed):
    "A cohort of phantoms whose patients are numbered from `first`"
    small = dict(slices=12, size=32, sequences='T1wCE', n_workers=0, progress=False)
    make_phantom(dest, n=n, test=0., auc=.9, seed=seed, **small)
    c = kaggle_cohort(dest)
    return c.assign(patient=[f'{first+int(p):05d}' for p in c.patient])


def prepared(cohort, dest, size=SIZE): return prepare(cohort, dest, 'T1wCE', size=size, n_workers=1, progress=False)


def model(seed, store=None):
    "An untrained network that says that it was trained on a store: the rules do not ask how good it is"
    torch.manual_seed(seed)
    seen = None if store is None else SeenVolumes.of(store, dict(train=store.table.patient), ['T1wCE'])
    return MGMTModel(create_backbone(ARCH, anisotropic=2), RECIPE, ('T1wCE',), seen=seen)


def frozen(dest, store, seed=0, trained_on=None):
    "A bundle whose threshold comes from ten patients of `store` that the model has not seen"
    held_back = store.table.patient[:12]
    m = model(seed, store.only(store.table.patient[12:]) if trained_on is None else trained_on)
    save_model(m, dest/f'model{seed}')
    v = predict(m, store.only(held_back), progress=False).merge(store.table[['patient','label']], on='patient')
    return freeze_bundle(dest/f'model{seed}', v, store, dest/f'bundle{seed}')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('made')
    train,test = scans(d/'train', 30, 0, 0),scans(d/'test', 24, 900, 1)
    frozen(d, prepared(train, d/'train-store'))
    prepared(test, d/'test-store')
    return d


@pytest.fixture
def study(made, tmp_path):
    "A study of its own for each test: folder, training store, test store and bundle"
    d = tmp_path/'study'
    shutil.copytree(made, d)
    return d,VolumeStore(d/'train-store'),VolumeStore(d/'test-store'),Bundle(d/'bundle0')


def run(bundle, cohort, **kwargs): return external_test(bundle, cohort, progress=False, **kwargs)


def with_other_pixels(store, dest, patients, pixels):
    "A copy of a store whose patients have other voxels, with hashes that fit, of files that nobody knows"
    shutil.copytree(store.path, dest, ignore=shutil.ignore_patterns('held_out.json','fingerprints'))
    array,d = np.load(dest/'T1wCE.npy', mmap_mode='r+'),json.loads((dest/'store.json').read_text())
    for p,x in zip(patients, pixels):
        entry = d['patients'][p]
        array[entry['row']] = x
        entry['volumes']['T1wCE']['hash'],entry['sources'] = f'new-{p}',None
    array.flush()
    write_json(dest/'store.json', d)
    return VolumeStore(dest)


def noisy(x, seed):
    "One grey level more or less in every voxel"
    return (x.astype(int)+rng_for(seed, 'noise').integers(-1, 2, x.shape)).clip(0, 255).astype(np.uint8)


def test_the_best_of_several_bundles_counts_as_such(study):
    d,train,test,b = study
    results = [run(o, test) for o in (b, frozen(d, train, 1), frozen(d, train, 2))]
    assert [r['record']['bundles'] for r in results]==[1,2,3]
    assert 'the best of 3 flatters' in results[-1]['note'] and 'flatters' not in results[0]['note']
    for r in results[1:]: assert r['record']['p_holm']>=r['record']['p']
    t = external_table(results)
    assert (t.bundles==3).all(), 'the first result is read today, when three have met the cohort'
    assert (t.p_holm>=t.p).all() and t.p_holm.min()==pytest.approx(min(1, 3*t.p.min()))


def test_tests_at_the_same_moment_lose_no_entry(study, user_home, monkeypatch):
    "Writing takes long enough here that each test would write over what the other has just entered."
    d,train,test,b = study
    def slowly(path, content):
        time.sleep(.3)
        write_json(path, content)
    both = b,frozen(d, train, 1)
    monkeypatch.setattr(records, 'write_json', slowly)
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(lambda o: run(o, test), both))
    assert sorted(r['record']['bundles'] for r in results)[-1]==2, 'the later one knows of the earlier one'
    for path in (held_out_file(test), next((user_home/'cohorts').glob('*.json'))):
        entries = json.loads(path.read_text())['entries']
        for kind in ('test','result'):
            assert {e['bundle'] for e in entries if e['kind']==kind}=={o.signature for o in both}
    with locked(b.path/f'external-{CohortRecord(test).key}'), ThreadPoolExecutor(1) as pool:
        again = pool.submit(run, b, test)
        with pytest.raises(MGMTError, match='wait until other tests of this cohort have ended'): again.result()
    assert run(b, test)['pass']==2


def test_copies_of_the_cohort_are_known(study):
    "Another folder, other names, another preparation: the volumes are known, or the files they are from."
    d,train,test,b = study
    run(b, test)
    c = scans(d/'test', 24, 700, 1)
    other = frozen(d, train, 1)
    note = run(other, prepared(c, d/'again'))['note']
    assert 'copies of this cohort were tested on this computer with 1 more' in note
    assert run(other, c, dest=d/'from-scans')['record']['bundles']==2, 'a store that is made for a test relies on all'
    with pytest.raises(ProtocolError, match='external test'): mgmt_dls(prepared(c, d/'small', (8,16,16)))


def test_trained_on_test_patients_and_frozen_with_another_store(study):
    d,train,test,_ = study
    with pytest.raises(ProtocolError, match='24 test patients have a volume that is equal to the voxel'):
        run(frozen(d, train, 1, trained_on=test), test)


def test_another_preparation_of_training_scans_is_refused(study):
    d,train,_,_ = study
    c = scans(d/'third', 14, 300, 2)
    other = prepared(c, d/'other', (8,16,16))
    b = frozen(d, train, 1, trained_on=other)
    with pytest.raises(ProtocolError, match='prepared from the very files'): run(b, prepared(c, d/'alike'))


def test_one_grey_level_of_noise_hides_nobody(study):
    d,train,test,b = study
    who = train.table.patient[12:].tolist()
    other = with_other_pixels(train, d/'noisy', who, [noisy(train.read(p)[0], p) for p in who])
    facts = json.loads((other.path/'patients.json').read_text())
    all_new = VolumeStore(other.path).only(who)
    all_new.meta = {f'x{p}': all_new.meta[p] for p in who}
    all_new.table['patient'] = ['x'+p for p in all_new.table.patient]
    assert facts['patients']
    with pytest.raises(ProtocolError, match='nobody is left to test: 18 patients'): run(b, all_new)


def test_some_copies_among_strangers_are_set_aside_and_named(study):
    d,train,test,b = study
    old,new = train.table.patient[12:16].tolist(),test.table.patient[:4].tolist()
    mixed = with_other_pixels(test, d/'mixed', new, [noisy(train.read(p)[0], p) for p in old])
    r = run(b, mixed)
    assert r['overlap']['same']==new and r['all']['n']==20 and '4 patients left out as brains' in r['note']
    assert [o['patient'] for o in r['cohort']['left_out']]==new


def test_uncertain_patients_are_counted_and_shown_without(study, monkeypatch):
    d,train,test,b = study
    new = test.table.patient[:2].tolist()
    mixed = with_other_pixels(test, d/'mixed', new, [noisy(train.read(p)[0], p) for p in train.table.patient[12:14]])
    monkeypatch.setattr(external, 'find_seen', partial(find_seen, alarms=(1e-300,.1)))
    r = run(b, mixed)
    doubt = r['overlap']['uncertain']
    assert not r['overlap']['same'] and set(new)<=set(doubt) and len(doubt)<6, 'a stranger may be among them'
    assert r['all']['n']==24 and r['without_uncertain']['n']==24-len(doubt)
    assert external_table(r)['set'].tolist()==['external','external, without uncertain']


def test_who_sets_the_misclassified_aside_is_told_so_first(study):
    _,_,test,b = study
    preds = run(b, test)
    t = pd.read_csv(b.path/preds['predictions']['file'], dtype=dict(patient=str)).merge(test.table[['patient','label']])
    wrong = t.patient[(t.prob>=b.threshold)!=(t.label==1)].tolist()[:12]
    r = run(b, test, leakage=wrong)
    assert r['note'].startswith(f'a list made by hand sets {len(wrong)} patients aside, of whom {len(wrong)} of')
    assert r['leakage']['source']==dict(kind='list made by hand') and r['leakage']['p_errors']<.05
    assert r['all']['n']==24 and r['without_suspected']['n']==24-len(wrong)


def test_an_audit_that_was_edited_is_a_list_made_by_hand(study, tmp_path):
    _,_,test,b = study
    audit = pd.DataFrame(dict(train=['00001'], test=['00900'], sequence='T1wCE', score=.9, verdict='same'))
    audit.to_csv(tmp_path/'leakage.csv', index=False)
    (tmp_path/'leakage.json').write_text('{}')
    for who,kind in ((['00900'],'leakage audit'),(['00900','00901'],'list made by hand')):
        pd.DataFrame(dict(patient=who)).to_csv(tmp_path/'set_aside.csv', index=False)
        source = run(b, test, leakage=tmp_path/'set_aside.csv')['leakage']['source']
        assert source['kind']==kind and source['file']=='set_aside.csv' and len(source['hash'])==32


@pytest.mark.parametrize('name', 'mgmt_dls recipe_dls sweep search out_of_fold cross_validate fuse freeze'.split())
def test_who_is_held_out_is_not_used(study, name):
    d,_,test,b = study
    run(b, test)
    t = test.table[['patient','label']].assign(prob=np.linspace(.1, .9, len(test)), a=np.linspace(-1, 1, len(test)))
    uses = dict(mgmt_dls=lambda: mgmt_dls(test), recipe_dls=lambda: recipe_dls(test),
        sweep=lambda: sweep(sweep_table([ARCH], ['T1wCE'], [0]), test.path, d/'sweep', RECIPE, progress=False),
        search=lambda: search(dict(lr=[1e-3,1e-2]), test.path, d/'search', 1, RECIPE),
        out_of_fold=lambda: out_of_fold(test, RECIPE, path=d/'oof', progress=False),
        cross_validate=lambda: cross_validate(test, d/'cv', progress=False),
        fuse=lambda: fuse(dict(a=d/'model0'), t, store=test),
        freeze=lambda: freeze_bundle(d/'model0', t, test, d/'b2'))
    with pytest.raises(ProtocolError, match='external test'): uses[name]()
    assert not any((d/o).exists() for o in ('sweep','search','oof','cv','b2'))


def test_a_copied_bundle_without_its_ledger(study):
    d,_,test,b = study
    run(b, test)
    shutil.copytree(b.path, d/'copy', ignore=shutil.ignore_patterns('ledger.jsonl'))
    with pytest.raises(ProtocolError, match='entries are missing'): run(d/'copy', test)
    again = prepared(scans(d/'test', 24, 900, 1), d/'again')
    assert 'copies of this bundle and cohort met once on this computer' in run(d/'copy', again)['note']


def sign_again(path, **changed):
    d = {k:v for k,v in json.loads(path.read_text()).items() if k!='signature'}
    write_json(path, signed({**d, **changed}))


def test_a_result_that_was_edited_and_signed_again(study):
    _,_,test,b = study
    r = run(b, test)
    path = (b.path/r['predictions']['file']).with_suffix('.json')
    sign_again(path, all={**r['all'], 'auc':[.99,.97,1.]})
    with pytest.raises(ProtocolError, match='changed and signed again'): read_result(path)


def test_a_threshold_that_was_edited_and_signed_again_is_another_bundle(study):
    d,_,test,b = study
    run(b, test)
    sign_again(b.path/'bundle.json', threshold=.9)
    with pytest.raises(ProtocolError, match='by hand'): run(b.path, test)
    (b.path/'ledger.jsonl').unlink()
    r = run(b.path, test)
    assert r['pass']==1 and r['record']['bundles']==2 and 'the best of 2 flatters' in r['note']


def test_what_no_hash_can_show_is_said(study, user_home):
    "With all records gone the cohort is a new one: the result says what its signature is worth."
    d,_,test,b = study
    run(b, test)
    for path in (b.path/'ledger.jsonl', held_out_file(test)): path.unlink()
    shutil.rmtree(user_home/'cohorts')
    note = run(b, test)['note']
    assert note.startswith('first pass') and 'hash without a key' in note and 'not announced beforehand' in note


def test_a_record_that_was_changed_by_hand(study, user_home):
    _,_,test,b = study
    run(b, test)
    held_out_file(test).write_text(held_out_file(test).read_text().replace('"pass": 1', '"pass": 0'))
    with pytest.raises(ProtocolError, match='changed by hand'): run(b, test)


def test_a_store_that_is_read_only_has_its_record_in_the_data_folder(study, monkeypatch):
    d,_,test,b = study
    enter = CohortRecord._enter
    def read_only(self, path, entry): return path!=held_out_file(self.store) and enter(self, path, entry)
    monkeypatch.setattr(CohortRecord, 'can_write', lambda self: False)
    monkeypatch.setattr(CohortRecord, '_enter', read_only)
    r = run(b, test)
    assert r['record']['where']==[f"cohorts/{r['record']['key']}.json in the user's data folder"]
    with pytest.raises(ProtocolError, match='external test'): mgmt_dls(test)
    assert run(b, test)['pass']==2


def test_validation_that_contradicts_the_store(study):
    d,train,_,_ = study
    t = train.table[['patient','label']]
    v = predict(d/'model0', train, progress=False).merge(t, on='patient')
    held_back = v[v.patient.isin(t.patient[:12])]
    freeze = partial(freeze_bundle, d/'model0', store=train, dest=d/'new')
    for bad,says in ((held_back.assign(label=1-held_back.label), 'labels of 12 validation patients are not those'),
            (held_back.assign(prob=1-held_back.prob), 'these models give')):
        with pytest.raises(ProtocolError, match=says): freeze(validation=bad)
    about = freeze(validation=held_back).validation
    assert (about['checked'],about['trained_on'])==(12,0)


def test_a_threshold_chosen_on_training_patients_is_said(study, capsys):
    d,train,test,_ = study
    v = predict(d/'model0', train, progress=False).merge(train.table[['patient','label']], on='patient')
    b = freeze_bundle(d/'model0', v, train, d/'on-training')
    said = f'the models were trained on {len(v)-12}'
    assert b.validation['trained_on']==len(v)-12 and said in capsys.readouterr().out
    assert said in run(b, test)['note']


def test_predictions_of_test_patients_are_entered(study):
    d,train,test,b = study
    b.predict(test, progress=False)
    predict(load_model(d/'model0'), test, progress=False)
    assert len(CohortRecord(test).predictions)==1, 'a model may predict strangers; a bundle is made for a test'
    r = run(b, test)
    assert 'it was predicted once outside of a test' in r['note']
    predict(load_model(d/'model0'), test, progress=False)
    r = run(b, test)
    assert r['record']['predictions']==dict(by_models=1, by_bundles=1)
    b.predict(train, progress=False)
    assert not CohortRecord(train).predictions, "training's own patients are no strangers"


def test_a_plan_and_what_deviates_from_it(study):
    d,train,test,b = study
    plan = preregister(d/'plan.json', b, 'phantoms', 'AUC above .6', n=24)
    r = run(b, test, plan=d/'plan.json')
    assert (r['plan']['hash'],r['plan']['deviates'],r['plan']['value'])==(plan['signature'],[],r['all']['auc'])
    r = run(frozen(d, train, 1), test.only(test.table.patient[:20]), plan=d/'plan.json')
    assert [o.split(' ')[0] for o in r['plan']['deviates']]==['another','threshold','20'] and 'deviates' in r['note']
    assert preregister(d/'plan.json', b, 'phantoms', 'AUC above .6', n=24)==plan
    with pytest.raises(ProtocolError, match='there already'): preregister(d/'plan.json', b, 'others', 'AUC above .6')
    sign = json.loads((d/'plan.json').read_text())
    write_json(d/'plan.json', {**sign, 'hypothesis':'AUC above .5'})
    with pytest.raises(ProtocolError, match='changed after it was signed'): run(b, test, plan=d/'plan.json')


def test_the_null_of_fingerprints_expects_what_it_says():
    "At most a tenth of a false alarm among all pairs of a sequence: seldom one in fifty sets of strangers."
    rng,alarms = rng_for(0, 'nulls'),0
    for _ in range(50):
        null = PrintNull(np.tanh(rng.normal(.04, .12, 435)), 30)
        limit = null.threshold(.1/720)
        alarms += bool((np.tanh(rng.normal(.04, .12, 720))>=limit).any())
    assert alarms<=10


def test_a_test_from_the_command_line_names_its_plan(study, capsys):
    d,_,test,b = study
    assert mgmt_preregister(d/'plan.json', b.path, 'phantoms of another seed', 'AUC above .6', n=24)==0
    said = capsys.readouterr().out
    assert json.loads((d/'plan.json').read_text())['signature'] in said and 'AUC decides' in said
    assert mgmt_external(b.path, test.path, d, plan=d/'plan.json')==0
    said = capsys.readouterr().out
    assert 'external: AUC' in said and "(Mee's, shrunk)" in said and 'fulfilled' in said
    assert mgmt_preregister(d/'other.json', b.path, 'phantoms', 'AUC above .6', 'aucc')==2
    assert "did you mean 'auc'" in capsys.readouterr().err and not (d/'other.json').exists()
