"A bundle handed on: what arrives is what was sent, and a hostile file leaves nothing behind."
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import stat
import zipfile
from copy import copy
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, logit

from mgmt_fast import pack
from mgmt_fast.backbones import create_backbone
from mgmt_fast.bundle import Bundle, freeze_bundle, freeze_predictions
from mgmt_fast.card import model_card
from mgmt_fast.cli import mgmt_pack, mgmt_predict, mgmt_push, mgmt_unpack
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, rng_for
from mgmt_fast.external import external_test
from mgmt_fast.learner import MGMTModel, load_model, predict, save_model
from mgmt_fast.pack import bundle_card, pack_bundle, pull_model, push_model, read_manifest, unpack_bundle
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.records import ProtocolError
from mgmt_fast.seen import SeenVolumes

ARCH,SIZE = 'timm/test_resnet',(8,24,24)
V01 = Path(__file__).parent/'v01'


def patients(dest, first, seed):
    "A prepared cohort of phantoms whose patients are numbered from `first`"
    small = dict(slices=12, size=32, sequences='T1wCE', n_workers=0, progress=False)
    make_phantom(dest/'scans', n=24, test=0., auc=.9, seed=seed, **small)
    c = kaggle_cohort(dest/'scans')
    c = c.assign(patient=[f'{first+int(p):05d}' for p in c.patient])
    return prepare(c, dest/'store', 'T1wCE', size=SIZE, n_workers=1, progress=False)


def network(seed, store, dest):
    "An untrained network that says that it was trained on a store"
    torch.manual_seed(seed)
    seen = SeenVolumes.of(store, dict(train=store.table.patient), ['T1wCE'])
    recipe = get_recipe('default', arch=ARCH, size=SIZE, anisotropic=2)
    save_model(MGMTModel(create_backbone(ARCH, anisotropic=2), recipe, ('T1wCE',), seen=seen), dest)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "An ensemble of two networks, each at its temperature, the patients of a test, and the pack"
    d = tmp_path_factory.mktemp('made')
    store = patients(d/'train', 0, 0)
    patients(d/'test', 900, 1)
    for i in range(2): network(i, store.only(store.table.patient[10:]), d/f'model{i}')
    valid,temperatures = store.only(store.table.patient[:10]),[.8, 1.7]
    models = [d/'model0', d/'model1']
    alone = [predict(load_model(m), valid, progress=False).prob for m in models]
    prob = expit(np.mean([logit(p)/t for p,t in zip(alone, temperatures)], axis=0))
    freeze_bundle(models, valid.table[['patient','label']].assign(prob=prob), store, d/'bundle', temperatures)
    pack_bundle(d/'bundle', d/'bundle.zip')
    return d


@pytest.fixture
def study(made, tmp_path):
    "A folder of its own for each test, with the bundle and its pack"
    for o in ('bundle','test'): shutil.copytree(made/o, tmp_path/o)
    shutil.copy(made/'bundle.zip', tmp_path)
    return tmp_path


def entries(file):
    "Name to bytes of an archive"
    with zipfile.ZipFile(file) as z: return {o.filename: z.read(o) for o in z.infolist()}


def write(file, files, change=lambda o: None, compression=zipfile.ZIP_STORED):
    "An archive of these files, whose entries may be changed before they are written"
    with zipfile.ZipFile(file, 'w', compression) as z:
        for name,data in files.items():
            entry = zipfile.ZipInfo('x')
            entry.filename,entry.compress_type = name,compression
            change(entry)
            z.writestr(entry, data)
    return file


def forged(file, files, **said):
    "A pack whose manifest was made anew for changed files, as somebody would who wants to deceive"
    files = {k:v for k,v in files.items() if k!='manifest.json'}
    hashes = {k: dict(bytes=len(v), sha256=hashlib.sha256(v).hexdigest()) for k,v in files.items()}
    manifest = {**json.loads(entries(file)['manifest.json']), 'files':hashes, **said}
    return write(file, {**files, 'manifest.json':json.dumps(manifest).encode()})


def refused(file, dest, says):
    "Unpacking raises one sentence, and leaves nothing behind"
    before = sorted(dest.parent.rglob('*'))
    with pytest.raises(MGMTError, match=says) as e: unpack_bundle(file, dest)
    assert '\n' not in str(e.value) and sorted(dest.parent.rglob('*'))==before


def test_the_same_probabilities_to_the_bit(study):
    store = VolumeStore(study/'test/store')
    arrived = unpack_bundle(study/'bundle.zip', study/'arrived')
    sent = Bundle(study/'bundle')
    a,b = (o.predict(store, progress=False) for o in (sent, arrived))
    assert a.prob.notna().all() and a.equals(b)
    assert (arrived.threshold,arrived.models,arrived.volumes)==(sent.threshold,sent.models,sent.volumes)
    assert [o.table.equals(p.table) for o,p in zip(sent.seen(), arrived.seen())]==[True, True]


def test_equal_bundles_give_equal_bytes(study):
    unpack_bundle(study/'bundle.zip', study/'arrived')
    for p in (study/'arrived').iterdir(): os.utime(p, (1e9, 1e9))
    again = pack_bundle(study/'arrived', study/'again.zip')
    assert (study/'again.zip').read_bytes()==(study/'bundle.zip').read_bytes()
    assert again['sha256']==hashlib.sha256((study/'bundle.zip').read_bytes()).hexdigest()


def test_a_bundle_of_version_01_travels(tmp_path):
    shutil.copytree(V01/'bundle', tmp_path/'bundle')
    shutil.copy(V01/'run/model.safetensors', tmp_path/'bundle/model-0.safetensors')
    pack_bundle(tmp_path/'bundle', tmp_path/'old.zip')
    arrived = unpack_bundle(tmp_path/'old.zip', tmp_path/'arrived')
    assert arrived.signature==Bundle(tmp_path/'bundle').signature
    assert len(arrived.ledger.passes())==len(Bundle(tmp_path/'bundle').ledger.passes())


def test_a_flipped_byte_is_refused_or_changes_no_file(study):
    whole,want = bytearray((study/'bundle.zip').read_bytes()),entries(study/'bundle.zip')
    rng,bad,n_refused = rng_for(0, 'flips'),study/'bad.zip',0
    near_the_end = len(whole)-1-rng.integers(1500, size=60)
    for i in [*rng.integers(len(whole), size=40), *near_the_end]:
        changed = whole.copy()
        changed[i] ^= 1<<int(rng.integers(8))
        bad.write_bytes(changed)
        try: unpack_bundle(bad, study/'arrived')
        except MGMTError:
            n_refused += 1
            assert not (study/'arrived').exists()
            continue
        got = {p.name: p.read_bytes() for p in (study/'arrived').iterdir()}
        assert got=={k:v for k,v in want.items() if k!='manifest.json'}
        shutil.rmtree(study/'arrived')
    assert n_refused>60
    assert not list(study.glob('.mgmt-tmp*'))


def test_a_pack_cut_short_is_refused(study):
    whole = (study/'bundle.zip').read_bytes()
    for n in [0, 1, 21, 22, *rng_for(0, 'cuts').integers(len(whole), size=20), len(whole)-1]:
        (study/'bad.zip').write_bytes(whole[:n])
        refused(study/'bad.zip', study/'arrived', 'cut short')


NAMES = ['../evil', '/evil', 'folder/evil', '..', '.hidden', 'C:\\evil', '..\\evil', 'evil\0.json', 'folder/', 'é.json',
    '']


@pytest.mark.parametrize('name', NAMES)
def test_names_that_lead_elsewhere(study, name):
    files = entries(study/'bundle.zip')
    refused(write(study/'bad.zip', {name:b'evil', **files}), study/'arrived', 'leads elsewhere')


def test_links_twins_and_what_swells(study):
    files,bad,dest = entries(study/'bundle.zip'),study/'bad.zip',study/'arrived'
    def link(o): o.external_attr = (stat.S_IFLNK|0o777)<<16
    refused(write(bad, files, link), dest, 'no plain file')
    refused(write(bad, {**files, 'Bundle.json':b'{}'}), dest, 'there twice')
    bomb = write(bad, {**files, 'bomb':bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size<2**25
    refused(bomb, dest, 'compressed')
    refused(write(bad, files, compression=zipfile.ZIP_LZMA), dest, 'compressed')


def test_entries_that_claim_more_than_there_is(study):
    "One that claims a terabyte, and many that share the same bytes"
    files,dest = entries(study/'bundle.zip'),study/'arrived'
    with zipfile.ZipFile(study/'bad.zip', 'w') as z:
        for k,v in files.items(): z.writestr(k, v)
        z.infolist()[0].file_size = z.infolist()[0].compress_size = 2**40
    refused(study/'bad.zip', dest, 'longer than the file')
    with zipfile.ZipFile(study/'bad.zip', 'w') as z:
        z.writestr('a', bytes(10_000))
        for i in range(50):
            twin = copy(z.infolist()[0])
            twin.filename = twin.orig_filename = f'a{i}'
            z.filelist.append(twin)
    refused(study/'bad.zip', dest, 'longer than the file')


def test_encrypted_entries(study):
    bad,whole = study/'bad.zip',(study/'bundle.zip').read_bytes()
    at = whole.rindex(b'PK\x01\x02')+8
    bad.write_bytes(whole[:at]+bytes([whole[at]|1])+whole[at+1:])
    refused(bad, study/'arrived', 'encrypted')


def test_other_archives_and_other_versions(study):
    files,bad,dest = entries(study/'bundle.zip'),study/'bundle.zip',study/'arrived'
    manifest = json.loads(files['manifest.json'])
    def having(text): return write(study/'bad.zip', {**files, 'manifest.json':text})
    refused(write(study/'bad.zip', {'notes.txt':b'x'}), dest, 'no pack of mgmt_fast')
    refused(having(b'[]'), dest, 'another kind')
    refused(having(json.dumps({**manifest, 'kind':'a model'}).encode()), dest, 'another kind')
    refused(having(b'['*5000), dest, 'cut short')
    refused(having(b'{"kind": "mgmt_fast pack", "form": 1}'), dest, 'bundle is missing')
    refused(having(json.dumps({**manifest, 'form':2, 'new':1}).encode()), dest, 'newer version. Update')
    refused(having(b' '*2**20+files['manifest.json']), dest, 'another kind')
    assert read_manifest(bad)==manifest


def test_a_manifest_and_its_files_must_agree(study):
    files,dest = entries(study/'bundle.zip'),study/'arrived'
    refused(write(study/'bad.zip', {**files, 'more.txt':b'x'}), dest, 'files that its manifest names')
    refused(write(study/'bad.zip', {k:v for k,v in files.items() if k!='ledger.jsonl'}), dest, 'its manifest names')
    other = bytes([files['card.md'][0]^1])+files['card.md'][1:]
    refused(write(study/'bad.zip', {**files, 'card.md':other}), dest, 'card.md in this pack is not the file')


def test_a_manifest_made_anew_hides_no_change(study):
    files,file,dest = entries(study/'bundle.zip'),study/'bundle.zip',study/'arrived'
    easier = files['bundle.json'].replace(b'"threshold": 0.', b'"threshold": 0.9')
    refused(forged(file, {**files, 'bundle.json':easier}), dest, 'changed after it was signed')
    weights = files['model-0.safetensors'][:-1]+b'x'
    refused(forged(file, {**files, 'model-0.safetensors':weights}), dest, 'not one bundle')
    without = {k:v for k,v in files.items() if k!='ledger.jsonl'}
    refused(forged(file, without), dest, 'files that its manifest names')
    refused(forged(file, {**files, 'run.py':b'print()'}), dest, 'files that its manifest names')
    refused(forged(file, files, bundle='0'*32), dest, 'of another one')
    refused(forged(file, files, passes=3), dest, 'of another one')


def test_a_line_of_the_ledger_taken_out_is_seen(study):
    b,store = Bundle(study/'bundle'),VolumeStore(study/'test/store')
    external_test(b, store, progress=False)
    pack_bundle(b, study/'tested.zip')
    files = entries(study/'tested.zip')
    assert read_manifest(study/'tested.zip')['passes']==1
    lines = files['ledger.jsonl'].splitlines(keepends=True)
    assert len(lines)==2
    refused(forged(study/'tested.zip', {**files, 'ledger.jsonl':lines[1]}), study/'arrived', 'by hand')


def test_packing_is_no_way_round_the_ledger(study, capsys):
    b,store = Bundle(study/'bundle'),VolumeStore(study/'test/store')
    external_test(b, store, progress=False)
    b.ledger.path.unlink()
    with pytest.raises(ProtocolError, match='entries are missing'): pack_bundle(b, study/'washed.zip')
    assert not (study/'washed.zip').exists()
    capsys.readouterr()
    older = unpack_bundle(study/'bundle.zip', study/'older')
    assert 'knows of 1 test of this bundle' in capsys.readouterr().out
    with pytest.raises(ProtocolError, match='entries are missing'): external_test(older, store, progress=False)
    with pytest.raises(ProtocolError, match='entries are missing'): pack_bundle(older, study/'washed.zip')


def test_passes_are_counted_on_in_what_arrives(study):
    "The next test of the unpacked bundle with the same patients is the second, on a computer that never saw the first"
    b,store = Bundle(study/'bundle'),VolumeStore(study/'test/store')
    external_test(b, store, progress=False)
    pack_bundle(b, study/'tested.zip')
    shutil.rmtree(os.environ['MGMT_FAST_HOME'])
    (study/'test/store/held_out.json').unlink()
    r = external_test(unpack_bundle(study/'tested.zip', study/'arrived'), store, progress=False)
    assert r['pass']==2 and 'pass 2' in r['note']


def test_a_test_that_is_not_finished_is_not_packed(study):
    b = Bundle(study/'bundle')
    b.ledger.enter(date='2026-11-01T00:00:00+00:00', result='external-1', volumes=[], begun=True, **{'pass':1})
    with pytest.raises(ProtocolError, match='not finished'): pack_bundle(b, study/'new.zip')
    b.ledger.enter(done='external-1')
    assert pack_bundle(b, study/'new.zip')['passes']==1


def test_a_changed_bundle_is_not_packed(study):
    path = study/'bundle/model-0.safetensors'
    path.write_bytes(path.read_bytes()[:-1]+b'x')
    with pytest.raises(ProtocolError, match='not the file that was frozen'):
        pack_bundle(study/'bundle', study/'new.zip')
    assert not (study/'new.zip').exists()


def test_what_is_no_bundle_is_not_packed(study):
    table = pd.DataFrame(dict(patient=list('abcdefghij'), label=[0,1]*5, prob=np.linspace(.2,.8,10)))
    freeze_predictions(table, study/'table')
    for o in (study/'table', study/'test', study/'none', study/'bundle.zip'):
        with pytest.raises(MGMTError): pack_bundle(o, study/'new.zip')
    assert not (study/'new.zip').exists()


@pytest.mark.parametrize('make,says', [
    (lambda p: None, 'No such file'), (Path.mkdir, 'no ordinary file'), (os.mkfifo, 'no ordinary file'),
    (Path.touch, 'cut short'), (lambda p: p.write_text('Dear colleague, '*100), 'cut short')])
def test_what_is_no_file_of_ours(study, make, says):
    make(study/'given.zip')
    refused(study/'given.zip', study/'arrived', says)
    with pytest.raises(MGMTError): unpack_bundle(study/'given.zip', study/'arrived', '0'*64)


def test_what_is_in_the_way_stays(study):
    (study/'file').write_text('mine')
    (study/'folder').mkdir()
    (study/'folder/mine.txt').write_text('mine')
    (study/'link').symlink_to(study/'elsewhere')
    for o in ('file','folder','link'): refused(study/'bundle.zip', study/o, 'something else')
    (study/'empty').mkdir()
    assert unpack_bundle(study/'bundle.zip', study/'empty').path==study/'empty'
    with pytest.raises(MGMTError, match='something else'): pack_bundle(study/'bundle', study/'file')
    assert (study/'file').read_text()=='mine'


def test_a_call_can_be_repeated(study):
    "What was packed or unpacked before stands; a bundle that was tested since is not the older pack, nor the reverse"
    b,store = Bundle(study/'bundle'),VolumeStore(study/'test/store')
    first = pack_bundle(b, study/'bundle.zip')
    arrived = unpack_bundle(study/'bundle.zip', study/'arrived')
    external_test(arrived, store, progress=False)
    again = unpack_bundle(study/'bundle.zip', study/'arrived')
    assert len(again.ledger.passes())==1 and read_manifest(study/'bundle.zip')['passes']==first['passes']==0
    with pytest.raises(MGMTError, match='something else'): pack_bundle(arrived, study/'bundle.zip')
    pack_bundle(arrived, study/'tested.zip')
    refused(study/'tested.zip', study/'bundle', 'something else')


def test_a_full_disk_and_a_stop_leave_nothing(study, monkeypatch):
    used = shutil.disk_usage(study)
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda _: used._replace(free=1000))
        refused(study/'bundle.zip', study/'arrived', '1,000 are free')
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(pack, '_check_bundle', stop)
        before = sorted(study.rglob('*'))
        with pytest.raises(KeyboardInterrupt): unpack_bundle(study/'bundle.zip', study/'arrived')
        assert sorted(study.rglob('*'))==before


def test_the_authors_card_travels(study):
    text = bundle_card(study/'bundle').replace('; 17 Ethical approval', '')+'\n17: approved by the committee, 2026\n'
    (study/'card.md').write_text(text, encoding='utf-8')
    pack_bundle(study/'bundle', study/'new.zip', study/'card.md')
    unpack_bundle(study/'new.zip', study/'arrived')
    pack_bundle(study/'arrived', study/'third.zip')
    assert entries(study/'third.zip')['card.md'].decode()==text
    for bad in (b'---\na: [\n---\n', b'\xff\xfe', b'x'*2**21):
        (study/'card.md').write_bytes(bad)
        with pytest.raises(MGMTError, match='no model card'):
            pack_bundle(study/'bundle', study/'bad.zip', study/'card.md')
    with pytest.raises(MGMTError, match='cannot be read'): pack_bundle(study/'bundle', study/'bad.zip', study/'none.md')


def test_a_card_names_all_items_and_no_patient(study):
    b = Bundle(study/'bundle')
    text = bundle_card(b)
    items = model_card(bundle=b)
    assert all(o in text for o in items.item) and f"{len(items[items.what.str.startswith('open')])} of 52" in text
    assert not [o for o in b.patients if o in text] and 'Research use only' in text
    table = items.assign(what='a | b <script>\nnext')
    assert '| a &#124; b &lt;script&gt; next |' in bundle_card(b, table)


class LocalHub:
    "The calls of `HfApi` that are used, in a folder; each must fit the real one's signature"
    def __init__(self, root): self.root,self.calls,self.private = root,[],{}

    def _takes(self, name, *args, **kwargs):
        inspect.signature(getattr(huggingface_hub.HfApi, name)).bind(self, *args, **kwargs)
        self.calls.append(name)

    def create_repo(self, repo_id, **kwargs):
        self._takes('create_repo', repo_id, **kwargs)
        self.private.setdefault(repo_id, kwargs['private'])

    def repo_info(self, repo_id):
        self._takes('repo_info', repo_id)
        return huggingface_hub.ModelInfo(id=repo_id, private=self.private[repo_id])

    def upload_folder(self, **kwargs):
        self._takes('upload_folder', **kwargs)
        shutil.copytree(kwargs['folder_path'], self.root/kwargs['repo_id'], dirs_exist_ok=True)

    def hf_hub_download(self, repo_id, filename, **kwargs):
        self._takes('hf_hub_download', repo_id, filename, **kwargs)
        source = self.root/repo_id/filename
        if not source.exists(): raise huggingface_hub.errors.LocalEntryNotFoundError('nothing there')
        return shutil.copy(source, kwargs['local_dir'])


def test_a_bundle_sent_and_fetched(study):
    hub,store = LocalHub(study/'hub'),VolumeStore(study/'test/store')
    said = push_model(study/'bundle', 'hospital/mgmt', confirm=True, api=hub)
    assert hub.calls==['create_repo','repo_info','upload_folder'] and hub.private=={'hospital/mgmt':True}
    files = sorted(p.name for p in (study/'hub/hospital/mgmt').iterdir())
    assert files==sorted(said.file)==['README.md','bundle.zip']
    assert [(study/'hub/hospital/mgmt'/o).stat().st_size for o in said.file]==said.bytes.tolist()
    card = huggingface_hub.ModelCard((study/'hub/hospital/mgmt/README.md').read_text(encoding='utf-8'))
    assert card.data.library_name=='mgmt_fast' and '17 Ethical approval' in card.text
    arrived = pull_model('hospital/mgmt', study/'arrived', api=hub)
    a,b = (o.predict(store, progress=False) for o in (Bundle(study/'bundle'), arrived))
    assert a.equals(b)
    left = {'bundle','test','bundle.zip','hub','arrived','user-home'}
    assert {p.name for p in study.iterdir()}<=left


def test_nothing_is_sent_without_being_asked(study, monkeypatch, capsys):
    hub = LocalHub(study/'hub')
    said = push_model(study/'bundle', 'hospital/mgmt', api=hub)
    assert not hub.calls and 'ids of 24 training patients' in said.holds[0]
    def none(*_, **__): raise AssertionError('a connection was about to be made')
    monkeypatch.setattr(huggingface_hub, 'HfApi', none)
    assert mgmt_push(study/'bundle', 'hospital/mgmt')==0
    assert 'nothing was sent' in capsys.readouterr().out


def test_a_public_repository_is_not_used_where_a_private_one_was_meant(study):
    hub = LocalHub(study/'hub')
    hub.private['hospital/mgmt'] = False
    with pytest.raises(MGMTError, match='is public, and nothing was sent'):
        push_model(study/'bundle', 'hospital/mgmt', confirm=True, api=hub)
    assert not (study/'hub').exists()
    push_model(study/'bundle', 'hospital/mgmt', private=False, confirm=True, api=hub)
    assert (study/'hub/hospital/mgmt/bundle.zip').exists()


def test_what_the_hub_refuses_is_one_sentence(study):
    class Refusing(LocalHub):
        def create_repo(self, *_, **__): raise error
    http = next(c for c in huggingface_hub.errors.HfHubHTTPError.__mro__ if c.__name__=='HTTPError')
    for error in (ConnectionError('secret'), huggingface_hub.errors.LocalTokenNotFoundError('secret'), http('secret')):
        with pytest.raises(MGMTError, match='hf auth login') as e:
            push_model(study/'bundle', 'hospital/mgmt', confirm=True, api=Refusing(study/'hub'))
        assert 'secret' not in str(e.value)
    before = sorted(study.rglob('*'))
    with pytest.raises(MGMTError, match='LocalEntryNotFoundError'):
        pull_model('hospital/none', study/'arrived', api=LocalHub(study/'hub'))
    assert sorted(study.rglob('*'))==before
    for name in ('mgmt', 'a/b/c', '../mgmt', 'a b/c', ''):
        with pytest.raises(MGMTError, match='OWNER/NAME'): push_model(study/'bundle', name)


def test_the_real_client_has_what_is_called():
    for o in ('create_repo','repo_info','upload_folder','hf_hub_download'):
        assert set(inspect.signature(getattr(LocalHub, o)).parameters)-{'kwargs'}<=set(inspect.signature(
            getattr(huggingface_hub.HfApi, o)).parameters)
    assert 'private' in {f.name for f in dataclasses.fields(huggingface_hub.ModelInfo)}


def test_the_commands_hand_a_bundle_on(study, capsys):
    d = study
    assert mgmt_pack(d/'bundle', d/'sent.zip')==0
    said = capsys.readouterr().out
    sha256 = re.search('[0-9a-f]{64}', said)[0]
    assert mgmt_unpack(d/'sent.zip', d/'arrived', sha256.upper())==0
    assert Bundle(d/'bundle').signature[:8] in capsys.readouterr().out
    assert mgmt_predict(d/'arrived', d/'test/scans', d/'preds.csv', n_workers=1)==0
    assert len(pd.read_csv(d/'preds.csv'))==24
    for wrong in (lambda: mgmt_pack(d/'bundle', d/'preds.csv'), lambda: mgmt_unpack(d/'sent.zip', d/'test'),
            lambda: mgmt_unpack(d/'sent.zip', d/'other', '0'*64), lambda: mgmt_unpack(d/'none.zip', d/'other')):
        capsys.readouterr()
        assert wrong()==2
        assert capsys.readouterr().err.count('\n')==1
    assert not (d/'other').exists()


def test_what_a_killed_command_left_goes_with_the_next(study, capsys):
    left = study/'.mgmt-tmp-elsewhere-1-x'
    left.mkdir()
    os.utime(left, (0, 0))
    assert mgmt_unpack(study/'bundle.zip', study/'arrived')==0 and not left.exists()
