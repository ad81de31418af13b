"Archives of every layout, alone and side by side; whose an image is, and of which exam; tables and choices of people."
import os

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from series_writer import affine_of, write_series

from mgmt_fast.archive import find_images, place_images, split_id
from mgmt_fast.cases import *
from mgmt_fast.clinical import *
from mgmt_fast.cohort import *
from mgmt_fast.folds import assign_folds
from mgmt_fast.core import SEQUENCES

AXIAL = affine_of(np.eye(3), (20,6,5), (-30,-40,12))
TIMES = dict(FLAIR=dict(RepetitionTime=9000, EchoTime=120, InversionTime=2500),
    T1w=dict(RepetitionTime=500, EchoTime=10),
    T1wCE=dict(RepetitionTime=500, EchoTime=10, ContrastBolusAgent='Gadovist'),
    T2w=dict(RepetitionTime=4000, EchoTime=95, InversionTime=10))
WORDS = dict(FLAIR='AX FLAIR', T1w='AX T1 SE', T1wCE='AX T1 POST', T2w='AX T2 FSE')
LAYOUTS = dict(
    upenn=('UPENN-GBM-{i:05d}_11/UPENN-GBM-{i:05d}_11_{s}.nii.gz', 'FLAIR T1 T1GD T2', 'UPENN-GBM-{i:05d}'),
    tcga_brats=('TCGA-02-{i:04d}/TCGA-02-{i:04d}_1996.08.23_{s}.nii.gz', 'flair t1 t1Gd t2', 'TCGA-02-{i:04d}'),
    own=('P{i:02d}/P{i:02d}_{s}.nii.gz', 'FLAIR T1w T1wCE T2w', 'P{i:02d}'),
    bids=('sub-{i:02d}/anat/sub-{i:02d}_{s}.nii.gz', 'FLAIR T1w ce-gd_T1w T2w', 'sub-{i:02d}'),
    bids_sessions=('sub-{i:02d}/ses-1/anat/sub-{i:02d}_ses-1_{s}.nii.gz', 'FLAIR T1w ce-gd_T1w T2w', 'sub-{i:02d}'),
    ucsf=('UCSF-PDGM-{i:04d}_nifti/UCSF-PDGM-{i:04d}_{s}.nii.gz', 'FLAIR T1 T1c T2', 'UCSF-PDGM-{i:04d}'),
    brats_2023=('BraTS-GLI-{i:05d}-000/BraTS-GLI-{i:05d}-000-{s}.nii.gz', 't2f t1n t1c t2w', 'BraTS-GLI-{i:05d}'),
    brats_2020=('BraTS20_Training_{i:03d}/BraTS20_Training_{i:03d}_{s}.nii.gz', 'flair t1 t1ce t2',
    'BraTS20_Training_{i:03d}'),
    brats_flat=('all/BraTS2021_{i:05d}_{s}.nii.gz', 'flair t1 t1ce t2', 'BraTS2021_{i:05d}'),
    tcia=('TCGA-06-{i:04d}/01-02-2001-NA-MR-7/{s}/1-01.dcm', '2-AX FLAIR|3-AX T1|4-AX T1 POST|5-AX T2 FSE',
    'TCGA-06-{i:04d}'),
    folders=('{i:05d}/{s}/Image-1.dcm', 'FLAIR T1w T1wCE T2w', '{i:05d}'),
    visits=('PatientID_{i:04d}/Timepoint_1/PatientID_{i:04d}_Timepoint_1_brain_{s}.nii.gz', 't2f t1n t1c t2w',
    'PatientID_{i:04d}'))


def touch(root, *names):
    for o in names:
        p = root/o
        p.parent.mkdir(parents=True, exist_ok=True); p.touch()


def lay(root, layout, i):
    "Empty files of patient `i` in a layout; what a cohort must say of them"
    path,names,patient = LAYOUTS[layout]
    names = names.split('|' if '|' in names else ' ')
    files = [path.format(i=i, s=s) for s in names]
    touch(root, *files)
    return patient.format(i=i), [o.rsplit('/', 1)[0] if o.endswith('.dcm') else o for o in files]


def holds(cohort, root, patient, files):
    r = cohort.set_index('patient').loc[patient]
    return [os.path.relpath(r[s], root) for s in SEQUENCES]==files


def problems(cohort):
    return set(cohort_report(cohort)[['patient','sequence','problem']].itertuples(index=False, name=None))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_alone(tmp_path, layout):
    "All sequences of all patients, in whatever way the folder is asked for"
    want = [lay(tmp_path/'in', layout, i) for i in (1,2)]
    df = find_cohort(tmp_path/'in')
    assert len(df)==2 and cohort_report(df).empty and all(holds(df, tmp_path/'in', *o) for o in want)
    same = tcga_cohort(tmp_path/'in')
    assert same[[*SEQUENCES]].equals(df[[*SEQUENCES]]) and same.patient.equals(df.patient)
    if layout.startswith('brats'): assert brats_cohort(tmp_path/'in').equals(df)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(LAYOUTS)), st.integers(1,99)), min_size=1, max_size=6, unique=True))
def test_layouts_side_by_side(tmp_path_factory, those):
    "However many archives lie side by side, nothing is lost and nothing is mixed"
    root,want = tmp_path_factory.mktemp('mix'),{}
    for layout,i in those:
        want.update([lay(root, layout, i)] if (k := LAYOUTS[layout][2].format(i=i)) not in want else [])
    df = find_cohort(root)
    assert set(df.patient)==set(want) and all(holds(df, root, *o) for o in want.items())


def test_other_images_are_not_taken(tmp_path):
    lay(tmp_path, 'ucsf', 4)
    more = 'T1_bias T1c_bias T2_bias FLAIR_bias ADC DWI SWI ASL brain_segmentation tumor_segmentation FA'.split()
    touch(tmp_path, *(f'UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{s}.nii.gz' for s in more))
    touch(tmp_path, 'derivatives/UCSF-PDGM-0004/UCSF-PDGM-0004_T1.nii.gz')
    df = find_cohort(tmp_path)
    assert [os.path.basename(df[s][0]) for s in SEQUENCES]==[f'UCSF-PDGM-0004_{s}.nii.gz'
        for s in ('FLAIR','T1','T1c','T2')]
    assert problems(df)=={('','','1 images below it belong to no patient')}


def test_one_session_is_chosen_and_the_others_are_told(tmp_path):
    for v,seqs in (('11',('T1','T2')),('21',('FLAIR','T1','T1GD','T2')),('31',('FLAIR','T1','T1GD','T2'))):
        touch(tmp_path, *(f'UPENN-GBM-00001_{v}/UPENN-GBM-00001_{v}_{s}.nii.gz' for s in seqs))
    table = pd.DataFrame({'ID':['UPENN-GBM-00001_11','UPENN-GBM-00001_21'], 'MGMT':['Not Available','Methylated']})
    df = find_cohort(tmp_path, labels=table)
    assert (df.patient[0],df.session[0],df.label[0])==('UPENN-GBM-00001','21',1)
    assert [o[2] for o in problems(df)]==['3 sessions: 21 is taken (most complete, then earliest), not 31, 11']


@pytest.mark.parametrize('written', ['UPENN-GBM-00001','UPENN-GBM-00001_11','upenn'])
def test_label_tables_match_patient_or_session(tmp_path, written):
    lay(tmp_path, 'upenn', 1)
    if written=='upenn': written = 'UPENN-GBM-00001_21'
    assert find_cohort(tmp_path, labels=pd.DataFrame({'ID':[written],'MGMT':['Methylated']})).label.tolist()==[1]


def test_ids_of_two_sites_are_two_patients(tmp_path):
    touch(tmp_path, *(f'SITE_00{i}/SITE_00{i}_{s}.nii.gz' for i in (1,2) for s in SEQUENCES))
    assert find_cohort(tmp_path).patient.tolist()==['SITE_001','SITE_002']
    assert patient_key('SITE_001')!=patient_key('SITE_002') and split_id('SITE_001')==('SITE_001',None)


def dicom(root, where, seq, **el):
    return write_series(root/where, np.ones((3,8,8), np.int16), AXIAL,
        **{'PatientName':'', **TIMES[seq], 'SeriesDescription':WORDS[seq], **el})


@pytest.mark.parametrize('same', [True,False])
def test_patient_id_decides_between_two_levels(tmp_path, same):
    for i in (1,2):
        for s in SEQUENCES:
            dicom(tmp_path, f'G1/X{i}/{s}', s, PatientID='A' if same else f'B{i}', StudyDate=f'2020010{i}')
    df = find_cohort(tmp_path)
    assert df.patient.tolist()==(['G1'] if same else ['X1','X2']) and df[[*SEQUENCES]].notna().all(axis=None)


@pytest.mark.parametrize('id', ['A17','ANONYMOUS',''])
def test_only_a_patient_id_joins_unknown_suffixes(tmp_path, id):
    "One id of a person makes two folders one patient; a filler, or none, leaves them two"
    for k,folder in enumerate(('P7_a','P7_b','P8_a')):
        for s in SEQUENCES: dicom(tmp_path, f'{folder}/{s}', s, PatientID=id if k<2 else 'B', StudyDate=f'2020010{k+1}')
    df = find_cohort(tmp_path)
    assert df.patient.tolist()==(['P7','P8_a'] if id=='A17' else ['P7_a','P7_b','P8_a'])


def test_no_header_no_guess(tmp_path):
    touch(tmp_path, *(f'G1/X{i}/{s}.nii.gz' for i in (1,2) for s in SEQUENCES))
    with pytest.raises(CohortError, match="'G1' is a patient with 2 sessions .* or 'G1' is a group of 2 patients"):
        find_cohort(tmp_path)
    labels = pd.DataFrame({'id':['X1','X2'],'label':[0,1]})
    assert find_cohort(tmp_path, labels=labels).patient.tolist()==['X1','X2']


def test_exams_of_two_dates_are_not_one_row(tmp_path):
    for k,s in enumerate(SEQUENCES):
        dicom(tmp_path, f'P01/{s}', s, PatientID='P01', StudyDate=f'2020010{1+k//3}', StudyInstanceUID=f'1.2.{k//3}')
    df = find_cohort(tmp_path)
    assert df[[*SEQUENCES]].notna().sum(axis=None)==3 and '2 sessions' in ' '.join(cohort_report(df).problem)
    assert '2020' not in df.to_string()+cohort_report(df).to_string()


def test_headers_name_what_folders_do_not(tmp_path):
    for k,s in enumerate(SEQUENCES): dicom(tmp_path, f'DICOM/PA000001/ST000001/SE{k:06d}', s, PatientID='A')
    touch(tmp_path, 'DICOMDIR', 'DICOM/PA000001/ST000001/SE000000/Thumbs.db')
    df = find_cohort(tmp_path)
    assert (df.patient[0],df.session[0])==('PA000001','ST000001') and [os.path.basename(df[s][0])
        for s in SEQUENCES]==[f'SE{k:06d}' for k in range(4)]


def test_a_folder_of_several_series_is_as_many_images(tmp_path):
    for k,s in enumerate(SEQUENCES):
        dicom(tmp_path, 'P01', s, PatientID='P01', SeriesInstanceUID=f'1.{k}', SeriesNumber=k, name=f'{s}-{{}}')
    df = find_cohort(tmp_path)
    assert df[[*SEQUENCES]].notna().all(axis=None) and [df[f'{s}_index'][0] for s in SEQUENCES]==[0,1,2,3]
    write_choices(df, tmp_path/'choices.csv')
    again = find_cohort(tmp_path, choices=tmp_path/'choices.csv')
    assert again[[f'{s}_index' for s in SEQUENCES]].equals(df[[f'{s}_index' for s in SEQUENCES]])


def test_contradictions_and_other_modalities_are_rows(tmp_path):
    dicom(tmp_path, 'P01/T1 PRE', 'T1wCE')
    dicom(tmp_path, 'P01/FLAIR', 'FLAIR', Modality='CT'); dicom(tmp_path, 'P01/T2w', 'T2w')
    dicom(tmp_path, 'P01/T1wCE', 'T1wCE', ImageType=['DERIVED','PRIMARY','DIFFUSION','ADC'])
    df = find_cohort(tmp_path)
    told = ' '.join(cohort_report(df).problem)
    assert df[[*SEQUENCES]].notna().sum(axis=None)==1 and 'modality CT, not MR' in told
    assert "AX T1" not in told and 'Gadovist' not in told


def test_choices_are_followed(tmp_path):
    dicom(tmp_path, 'in/P01/A', 'T1w'); dicom(tmp_path, 'in/P01/B', 'T1w'); dicom(tmp_path, 'in/P01/FLAIR', 'FLAIR')
    df = find_cohort(tmp_path/'in')
    assert pd.isna(df.T1w[0]) and ('P01','T1w','2 images, and no telling which to use') in problems(df)
    table = write_choices(df, tmp_path/'choices.csv')
    assert len(table)==3 and set(table.columns)>={'patient','sequence','index','use','path'}
    table.loc[table.path=='P01/B', ['use','index']] = ['yes','0']
    table.to_csv(tmp_path/'choices.csv', index=False)
    df = find_cohort(tmp_path/'in', choices=tmp_path/'choices.csv')
    assert os.path.basename(df.T1w[0])=='B' and df.T1w_index[0]==0
    with pytest.raises(CohortError, match='two images of P01 as T1w'):
        find_cohort(tmp_path/'in', choices=table.assign(use='yes'))
    with pytest.raises(CohortError, match='T9w'): find_cohort(tmp_path/'in', choices=table.assign(sequence='T9w'))
    with pytest.raises(CohortError, match='use'): find_cohort(tmp_path/'in', choices=table.drop(columns='use'))


def test_dead_links_pipes_packed_files_and_names_that_are_no_text(tmp_path):
    lay(tmp_path, 'own', 1)
    for s in ('T2w','T1wCE','T1w'): (tmp_path/f'P01/P01_{s}.nii.gz').unlink()
    (tmp_path/'P01/P01_T2w.nii.gz').symlink_to(tmp_path/'nowhere'); os.mkfifo(tmp_path/'P01/P01_T1wCE.nii.gz')
    touch(tmp_path, 'more.zip', '__MACOSX/P01/T1w.nii.gz')
    strange = os.path.join(os.fsencode(tmp_path), b'P\xe9rez2')
    os.mkdir(strange); open(strange+b'/T1w.nii.gz', 'w').close()
    df = find_cohort(tmp_path)
    assert df.patient.tolist()==['P01','P\ufffdrez2'] and df.FLAIR.notna().tolist()==[True,False]
    assert ('P01','T2w','a link that leads nowhere') in problems(df) and any('more.zip' in o[2] for o in problems(df))
    cohort_report(df).to_csv().encode()
    write_choices(df, tmp_path/'choices.csv')
    assert find_cohort(tmp_path, choices=tmp_path/'choices.csv').T1w.notna().tolist()==[False,True]


def test_folders_that_lead_back_end(tmp_path):
    lay(tmp_path, 'own', 1); (tmp_path/'P01/again').symlink_to(tmp_path); (tmp_path/'self').symlink_to(tmp_path/'self')
    assert len(find_images(tmp_path)[0])==4 and len(place_images(tmp_path, find_images(tmp_path)[0])[0])==4


TABLES = {
    'trailing commas': ('BraTS21ID,MGMT_value,IDH\n00000,0,1,\n00001,1,0,\n', 'utf-8'),
    'a comma more in the header too': ('BraTS21ID,MGMT_value,\n00000,0,\n00001,1,\n', 'utf-8'),
    'Excel': ('sep=;\r\nBraTS21ID;MGMT_value\r\n00000;0,0\r\n;\r\n00001;1,0\r\n', 'utf-16'),
    'cp1252': ('Año;Patient ID;MGMT status\n2001;00000;No metilado\n2002;00001;Metilado\n', 'cp1252'),
    'BOM': ('\ufeffid\tMGMT\n00000\tU\n00001\tM\n', 'utf-8'),
    'booleans': ('id,MGMT methylated\n00000,FALSE\n00001,True\n', 'utf-8'),
    'words': ('id|mgmt\n00000|Unmethylated \n00001| METHYLATED\n00002|[Not Available]\n00003|not tested\n00004|n.d.\n',
    'utf-8'),
    'a name twice': ('id,id,label\n00000,a,0\n00001,b,1\n', 'utf-8'),
    'quoted': ('"id","MGMT","note"\n"00000","0","a, b"\n"00001","1",""\n', 'utf-8'),
    'French': ('id;statut MGMT\n00000;non méthylé\n00001;méthylé\n', 'utf-8')}


@pytest.mark.parametrize('case', TABLES)
def test_tables_of_hospitals(tmp_path, case):
    text,coding = TABLES[case]
    (tmp_path/'t.csv').write_bytes(text.encode(coding))
    df = read_labels(tmp_path/'t.csv')
    assert df.label[:2].tolist()==[0,1] and df.label[2:].isna().all() and not df.attrs['report']


def test_unknown_words_are_rows_and_numbers_stop(tmp_path):
    (tmp_path/'t.csv').write_text('id,label\n1,1\n2,perhaps\n3,1 or 0\n')
    df = read_labels(tmp_path/'t.csv')
    assert df.label.fillna(-1).tolist()==[1,-1,-1] and [o[0] for o in df.attrs['report']]==['2','3']
    for text,says in (('id,label\n1,2\n','the label of 1'), ('id,label\n1,a\n2,b\n','another column'),
        ('id,label\n1,0,0\n','row 2 has 3 cells'),
        ('id,mgmt index,mgmt level\n1,0,1\n','could both be it')):
        (tmp_path/'t.csv').write_text(text)
        with pytest.raises(CohortError, match=says): read_labels(tmp_path/'t.csv')


def test_columns_can_be_named_and_are_told(tmp_path, capsys):
    lay(tmp_path/'in', 'own', 1)
    (tmp_path/'t.csv').write_text('nummer,befund\nP01,methyliert\n')
    df = find_cohort(tmp_path/'in', labels=tmp_path/'t.csv', id_col='nummer', label_col='befund')
    assert df.label.tolist()==[1] and "labels of column 'befund', ids of 'nummer'" in capsys.readouterr().out


def test_visits_share_a_fold():
    pats = [f'{p}{i:05d}{v}' for p,vs in (('UPENN-GBM-',('_11','_21')),('BraTS-GLI-',('-000','-001')),
        ('sub-',('_ses-1','_ses-2'))) for i in range(9) for v in vs]
    df = pd.DataFrame({'patient':pd.array(pats, dtype='string'),
        'label':pd.array([i//2%2 for i in range(len(pats))], dtype='Int64')})
    f = assign_folds(df, n=3)
    assert f.groupby(f.patient.map(patient_key)).fold.nunique().max()==1


def test_one_image_per_file_format(tmp_path):
    nib.save(nib.Nifti1Pair(np.ones((4,4,4), np.float32), np.diag([2.,2,2,1])), tmp_path/'P01_T1w.img')
    touch(tmp_path, 'P01_T2w.nrrd', 'notes.img.txt')
    assert sorted(o.parts[-1] for o in find_images(tmp_path)[0])==['P01_T1w.hdr','P01_T2w.nrrd']
