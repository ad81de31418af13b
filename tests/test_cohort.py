"Cohorts: untidy folders and tables, and folds on random cohorts."
import codecs

import numpy as np, pandas as pd, pytest
from fastcore.test import test_fail as fails
from hypothesis import given, settings, strategies as st

from mgmt_fast.cases import *
from mgmt_fast.clinical import *
from mgmt_fast.cohort import *
from mgmt_fast.folds import *
from mgmt_fast.core import SEQUENCES


def touch(root, *names):
    for o in names:
        p = root/o
        p.parent.mkdir(parents=True, exist_ok=True); p.touch()


@pytest.fixture
def comp(tmp_path):
    for o in ('00000','00002','00003'): touch(tmp_path/'train'/o, *(f'{s}/Image-1.dcm' for s in SEQUENCES))
    (tmp_path/'train_labels.csv').write_text('BraTS21ID,MGMT_value\n00000,1\n00002,0\n00003,1\n')
    return tmp_path


def problems(cohort):
    return set(cohort_report(cohort)[['patient','sequence','problem']].itertuples(index=False, name=None))


def test_clean_folder_has_no_problem(comp):
    df = kaggle_cohort(comp)
    assert list(df.columns)==['patient','session','label',*SEQUENCES,'source'] and len(df)==3
    assert cohort_report(df).empty
    text = dict.fromkeys(['patient','session',*SEQUENCES,'source'], 'string')
    assert df.dtypes.astype(str).to_dict()=={**text, 'label':'Int64'}


@pytest.mark.parametrize('column', ['MGMT_unmethylated', 'unmethylated_MGMT', 'MGMT non-methylated', 'MGMT negative'])
def test_a_column_of_the_opposite_is_not_the_label(comp, column):
    (comp/'train_labels.csv').write_text(f'BraTS21ID,{column}\n00000,1\n00002,0\n')
    with pytest.raises(CohortError, match='Name it'): kaggle_cohort(comp)


@pytest.mark.parametrize('text', ['BraTS21ID,MGMT_value\r\n0,1.0\r\n2,0.0\r\n3,\r\n',
    'BraTS21ID;MGMT_value\n0;methylated\n2;UNMETHYLATED\n3;NA\n',
    'mgmt status\tPatient ID\npositive\t00000\nnegative\t00002\nindeterminate\t00003'])
def test_tables_as_spreadsheets_write_them(comp, text):
    (comp/'train_labels.csv').write_bytes(codecs.BOM_UTF8+text.encode())
    assert kaggle_cohort(comp).label.fillna(-1).tolist()==[1,0,-1]


@pytest.mark.parametrize('label', ['2','-1','.5','inf'])
def test_label_outside_0_1_stops(comp, label):
    (comp/'train_labels.csv').write_text(f'BraTS21ID,MGMT_value\n00000,1\n00002,{label}\n')
    fails(lambda: kaggle_cohort(comp), contains='the label of 00002 is')


def test_duplicate_ids_in_the_table(comp):
    (comp/'train_labels.csv').write_text('BraTS21ID,MGMT_value\n00000,1\n0,1\n00002,0\n2,1\n00003,\n3,1\n')
    df = kaggle_cohort(comp)
    assert df.label.fillna(-1).tolist()==[1,-1,1]
    assert {p for p,_,o in problems(df) if 'disagree' in o}=={'00002'}
    assert {p for p,_,o in problems(df) if 'with one label' in o}=={'00000','00003'}


def test_duplicate_folders_are_kept_told_and_share_a_fold(comp):
    touch(comp/'train', *(f'{p}/FLAIR/Image-1.dcm' for p in ('2','00004','00005')))
    df = kaggle_cohort(comp, labels=pd.DataFrame({'id':[0,2,3,4,5],'label':[1,0,1,0,0]}))
    assert df.patient.tolist()==['00000','00002','00003','00004','00005','2'] and df.label[5]==0
    assert any(p=='2' and 'same patient as 00002' in o for p,_,o in problems(df))
    fold = assign_folds(df, n=2).set_index('patient').fold
    assert fold['2']==fold['00002']


def test_folder_problems_become_rows(comp):
    (comp/'train'/'00000'/'FLAIR'/'Image-1.dcm').unlink()
    (comp/'train'/'00002'/'T1w'/'Image-1.dcm').rename(comp/'train'/'00002'/'T1w'/'slice.png')
    touch(comp/'train'/'00003'/'T2w', 'a.nii.gz', 'b.nii')
    df = kaggle_cohort(comp)
    assert problems(df)=={('00000','FLAIR','its folder holds no DICOM or NIfTI file'),
        ('00002','T1w','its folder holds no DICOM or NIfTI file'),
        ('00003','T2w','2 images, and no telling which to use')}
    assert df[[*SEQUENCES]].isna().sum(axis=None)==3


def test_unreadable_folder_is_one_row_and_the_rest_is_read(comp, monkeypatch):
    import mgmt_fast.archive as mod
    entries = mod._folder_entries
    def _folder_entries(folder):
        if str(folder).endswith('00002'): raise PermissionError(13, 'Permission denied')
        return entries(folder)
    monkeypatch.setattr(mod, '_folder_entries', _folder_entries)
    df = kaggle_cohort(comp)
    assert df.FLAIR.notna().tolist()==[True,False,True]
    assert ('00002','','the folder cannot be read (Permission denied)') in problems(df)


@pytest.mark.parametrize('make', [find_cohort, brats_cohort, tcga_cohort, nifti_cohort, kaggle_cohort])
def test_empty_and_foreign_folders(tmp_path, make):
    fails(lambda: make(tmp_path/'none'), contains='no folder at')
    fails(lambda: make(tmp_path), contains='is empty')
    touch(tmp_path, 'letters/a.pdf', 'letters/b.txt', 'c.mp4')
    with pytest.raises(CohortError): make(tmp_path)


def test_label_table_missing_binary_or_without_columns(comp):
    fails(lambda: kaggle_cohort(comp, labels=comp/'other.csv'), contains='no table at')
    (comp/'x.csv').write_bytes(bytes(range(256))*4)
    fails(lambda: kaggle_cohort(comp, labels=comp/'x.csv'), contains='not a table')
    (comp/'x.csv').write_text('')
    fails(lambda: kaggle_cohort(comp, labels=comp/'x.csv'), contains='not a table')
    (comp/'x.csv').write_text('name,mgmt\nA,1\n')
    fails(lambda: kaggle_cohort(comp, labels=comp/'x.csv'), contains='it has name, mgmt')
    (comp/'train_labels.csv').unlink()
    fails(lambda: kaggle_cohort(comp), contains='labels=False')
    assert kaggle_cohort(comp, labels=False).label.isna().all()


def test_ids_that_match_nothing(comp):
    df = kaggle_cohort(comp, labels=pd.DataFrame({'BraTS21ID':['A','B'],'MGMT_value':[0,1]}))
    assert df.patient.tolist()==['00000','00002','00003','A','B'] and df.label.notna().sum()==2
    assert len([o for *_,o in problems(df) if o.startswith('not in the label table')])==3
    assert len([o for *_,o in problems(df) if o.startswith('labelled, but')])==2


def test_test_split_takes_ids_not_labels_from_the_submission(comp):
    touch(comp/'test', '00001/FLAIR/Image-1.dcm')
    (comp/'sample_submission.csv').write_text('BraTS21ID,MGMT_value\n00001,0.5\n00013,0.5\n')
    df = kaggle_cohort(comp, 'test')
    assert df.patient.tolist()==['00001','00013'] and df.label.isna().all()
    assert df.source.unique().tolist()==['kaggle/test']
    assert find_cohort(comp/'test').patient.tolist()==['00001','00013']
    assert find_cohort(comp).patient.tolist()==['00000','00002','00003']


def test_several_patients_in_one_flat_folder_point_to_a_pattern(tmp_path):
    touch(tmp_path, *(f'{p}_{s}.nii.gz' for p in ('ann','bob') for s in ('flair','t1','t1ce','t2')))
    fails(lambda: find_cohort(tmp_path), contains='nifti_cohort')
    df = nifti_cohort(tmp_path, '{patient}_{sequence}.nii.gz')
    assert df.patient.tolist()==['ann','bob'] and cohort_report(df).empty


def test_ids_like_visits_are_said_and_those_of_bids_are_joined(tmp_path):
    touch(tmp_path, *(f'{p}/{s}.nii.gz' for p in ('P1_ses-1','P1_ses-2','P2_v1','P2_v2','P3') for s in SEQUENCES))
    df = find_cohort(tmp_path)
    assert df.set_index('patient').session.fillna('').to_dict()=={'P1':'1','P2_v1':'','P2_v2':'','P3':''}
    said = {p: what for p,_,what in problems(df)}
    assert set(said)=={'P1','P2_v1'} and 'may be the same patient as P2_v2' in said['P2_v1']


@pytest.mark.parametrize('a,b', [('scan1','scan2'), ('A','B')])
def test_folders_that_may_be_exams_are_said(tmp_path, a, b):
    for p in ('P1','P2'):
        touch(tmp_path, *(f'{p}/{o}.nii.gz' for o in (f'{a}/FLAIR',f'{a}/T1w',f'{b}/T2w')))
    assert ('P1','',f'its sequences lie in {a} and {b}: taken as one exam') in problems(find_cohort(tmp_path))


def test_report_survives_pandas(comp):
    (comp/'train'/'00000'/'FLAIR'/'Image-1.dcm').unlink()
    df = kaggle_cohort(comp)
    for o in (df[df.label==1], df.copy(), df.assign(x=1), df.sort_values('label'),
        df.merge(df[['patient']], on='patient'), pd.concat([df,df])):
        assert len(cohort_report(o))==1
    other = kaggle_cohort(comp, labels=False)
    assert len(pd.concat([df, drop_patients(other, ['99'])]))==6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0,30), st.sampled_from([0,1,None])), min_size=40, max_size=120),
    st.integers(0,99), st.integers(2,4))
def test_folds(rows, seed, n):
    "Random patients with several scans, whose labels may even disagree"
    cohort = pd.DataFrame({'patient':[f'BraTS-GLI-{p:05d}-{i:03d}' for i,(p,_) in enumerate(rows)],
        'label':pd.array([l for _,l in rows], dtype='Int64')})
    key = cohort.patient.map(patient_key)
    y = cohort.label.groupby(key).max()
    if (y==0).sum()<n or (y==1).sum()<n: return fails(lambda: assign_folds(cohort, n, seed), contains='smaller n')
    df = assign_folds(cohort, n, seed)
    of = df.fold.groupby(key)
    assert of.nunique().max()<=1 and (of.max().isna()==y.isna()).all() and df.fold.dropna().between(0, n-1).all()
    for label in (0,1): assert np.ptp(of.max()[y==label].value_counts().reindex(range(n), fill_value=0))<=1
    assert assign_folds(cohort.iloc[::-1], n, seed).sort_index().fold.equals(df.fold)


def test_given_folds(comp):
    df = kaggle_cohort(comp)
    res = assign_folds(df, folds=pd.DataFrame({'BraTS21ID':[0,2,7],'fold':[1,0,1]}))
    assert res.fold.fillna(-1).tolist()==[1,0,-1] and {p for p,*_ in problems(res)}=={'00003','7'}
    visits = df.assign(patient=['BraTS-GLI-00001-000','BraTS-GLI-00001-001','BraTS-GLI-00002-000'])
    fails(lambda: assign_folds(visits, folds=pd.DataFrame({'id':visits.patient,'fold':[0,1,0]})),
        contains='a patient belongs to one')
    fails(lambda: assign_folds(df, folds=pd.DataFrame({'id':[0]})), contains="no column 'fold'")


@pytest.mark.real
def test_other_competitors_tables(data):
    df = kaggle_cohort(data/'labels'/'rsna_miccai'/'train_labels.csv')
    bad = read_ids(data/'labels'/'rsna_miccai'/'anenbergb'/'patient_exclusion.csv')
    left = drop_patients(df, bad)
    assert len(bad)==30 and len(df)-len(left)+len(cohort_report(left))-len(cohort_report(df))==30
    assert len(read_ids(data/'labels'/'rsna_miccai'/'gonzo3832'/'sample_submission.csv'))==87


@pytest.mark.real
def test_a_table_marks_sequences_as_unusable(data, tmp_path):
    for p in ('00109','00123','00709'): touch(tmp_path/'train'/p, *(f'{s}/Image-1.dcm' for s in SEQUENCES))
    df = kaggle_cohort(tmp_path, labels=data/'labels'/'rsna_miccai'/'gonzo3832'/'train_labels_add_imtype.csv').head(585)
    df = df[df[[*SEQUENCES]].notna().any(axis=1)].set_index('patient')
    assert {(p,s) for p in df.index for s in SEQUENCES if pd.isna(df.loc[p,s])}=={('00109','FLAIR'),('00709','FLAIR'),
        ('00123','T1w'),('00123','T2w')}


# ---- a column of the label table that says whose each id is

SITE = 'scan,person,patient,MGMT\nSITE_001,A,x,1\nSITE_002,A,x,1\nSITE_003,B,y,0\nSITE_004,,z,\n'


@pytest.fixture
def site(tmp_path):
    "Four folders; the first lacks a sequence, and the table gives it to the patient of the second"
    for i in range(1, 5): touch(tmp_path/'scans'/f'SITE_00{i}', *(f'{s}.nii.gz' for s in SEQUENCES[i==1:]))
    (tmp_path/'labels.csv').write_text(SITE)
    return tmp_path


WAYS = dict(found=find_cohort, tcga=tcga_cohort, nifti=nifti_cohort)


@pytest.mark.parametrize('way', WAYS)
def test_ids_of_one_patient_are_one_row_where_a_column_says_so(site, way):
    def cohort(**how): return WAYS[way](site/'scans', labels=site/'labels.csv', id_col='scan', **how)
    assert cohort().patient.tolist()==[f'SITE_00{i}' for i in range(1, 5)]
    df = cohort(patient_col='person')
    assert df.patient.tolist()==['A','B','SITE_004'] and df.label.fillna(-1).tolist()==[1,0,-1]
    assert df.session.fillna('').tolist()==['SITE_002','','']
    assert all('SITE_002' in df[s][0] for s in SEQUENCES)
    assert any('SITE_002 is taken' in o and 'not SITE_001' in o for o in cohort_report(df).problem)
    assert not cohort_report(df).problem.str.contains('label').any()


def test_the_column_may_be_called_as_ids_usually_are(site):
    df = find_cohort(site/'scans', site/'labels.csv', id_col='scan', patient_col='patient')
    assert df.patient.tolist()==['x','y','z']
    (site/'t.csv').write_text(SITE.replace('scan,', 'subject,'))
    assert find_cohort(site/'scans', site/'t.csv', patient_col='patient').patient.tolist()==['x','y','z']


def test_the_competition_and_a_table_alone_are_joined_too(comp):
    (comp/'train_labels.csv').write_text('BraTS21ID,MGMT_value,who\n00000,1,7\n00002,0,8\n00003,1,007\n')
    for df in (find_cohort(comp, patient_col='who'), find_cohort(comp/'train_labels.csv', patient_col='who')):
        assert df.patient.tolist()==['7','8'] and df.label.tolist()==[1,0]


def test_labels_of_one_patient_that_disagree_are_none(site):
    (site/'labels.csv').write_text(SITE.replace('SITE_002,A,x,1', 'SITE_002,A,x,0'))
    df = find_cohort(site/'scans', site/'labels.csv', id_col='scan', patient_col='person')
    assert df.label.fillna(-1).tolist()==[-1,0,-1] and any('disagree' in o for o in cohort_report(df).problem)


def test_choices_are_written_and_read_by_the_joined_patient(site):
    how = dict(labels=site/'labels.csv', id_col='scan', patient_col='person')
    table = write_choices(find_cohort(site/'scans', **how), site/'choices.csv')
    mine = table.patient=='A'
    table.loc[mine,'use'] = ['yes' if 'SITE_001' in o else '' for o in table.path[mine]]
    table.to_csv(site/'choices.csv', index=False)
    df = find_cohort(site/'scans', **how, choices=site/'choices.csv')
    assert df.session[0]=='SITE_001' and 'SITE_001' in df[SEQUENCES[1]][0] and pd.isna(df[SEQUENCES[0]][0])


@pytest.mark.parametrize('how,says', [(dict(patient_col='nobody'), "no column 'nobody'"),
    (dict(patient_col='scan'), 'both'), (dict(patient_col='person', labels=None), 'there is no label table')])
def test_a_column_that_cannot_be_is_refused(site, how, says):
    fails(lambda: find_cohort(site/'scans', **{**dict(labels=site/'labels.csv', id_col='scan'), **how}), contains=says)


def test_an_id_of_two_patients_is_refused(site):
    (site/'labels.csv').write_text(SITE+'SITE_001,B,x,1\n')
    fails(lambda: find_cohort(site/'scans', site/'labels.csv', id_col='scan', patient_col='person'),
        contains='SITE_001 to two patients')
