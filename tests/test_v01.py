"What version 0.1 wrote is read where that is safe, else it is said what to do."
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mgmt_fast.core import MGMTError
from mgmt_fast.prepare import VolumeStore, prepare

OLD = Path(__file__).parent/'v01'


@pytest.fixture
def old(tmp_path):
    "A copy, since some of it is written to."
    shutil.copytree(OLD, tmp_path/'v01')
    return tmp_path/'v01'


def test_a_store_is_read_with_its_labels(old):
    store,d = VolumeStore(old/'store'),json.loads((old/'store/store.json').read_text())
    assert store.version=='0.1.0' and store.sequences==('FLAIR','T1wCE')
    assert store.table.label.tolist()==[v['label'] for v in d['patients'].values()]
    assert store.read('00003').shape==(2,4,12,12) and not len(store.verify())


def test_a_store_is_brought_up_to_date(old, tmp_path, capsys):
    "Its pixels are taken as they are, which is said; from then on a replaced scan is noticed."
    store = VolumeStore(old/'store')
    scan = tmp_path/'scan.nii'; scan.write_bytes(b'any file')
    cohort = store.table.assign(FLAIR=str(scan), T1wCE=str(scan), label=1-store.table.label)
    new = prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    said = capsys.readouterr().out
    assert '44 patients as prepared before' in said and '44 prepared by version 0.1, which did not write down from which files' in said
    assert '44 labels changed' in said and new.table.label.tolist()==cohort.label.tolist()
    assert (new.read('00003')==store.read('00003')).all()
    prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    assert 'version 0.1' not in capsys.readouterr().out
    other = tmp_path/'other.nii'; other.write_bytes(b'another')
    cohort.loc[0,'FLAIR'] = str(other)
    prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    assert '1 prepared again, since their scans were replaced (00000)' in capsys.readouterr().out


def test_an_unfinished_store_says_what_to_do(old, tmp_path):
    d = json.loads((old/'store/store.json').read_text())
    (old/'store/store.json').unlink()
    (old/'store/journal.jsonl').write_text(json.dumps(d['key'])+'\n')
    cohort = pd.DataFrame(dict(patient=['00000'], label=[1], FLAIR=['x.nii']))
    with pytest.raises(MGMTError, match='unfinished store of version 0.1.0.*delete it'): prepare(cohort, old/'store', 'FLAIR', size=(4,12,12), progress=False)
