"Can an image be what it is taken for: each way in which it cannot is a finding, and an innocent image has none."
import os, struct

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from scipy import ndimage
from series_writer import *

from mgmt_fast.audit import audit, audit_cohort
from mgmt_fast.core import SEQUENCES, Volume, get_recipe
from mgmt_fast.prepare import foreground, prepare, prepare_patient
from mgmt_fast.dicom import SeriesError
from mgmt_fast.quality import audit_series
from mgmt_fast.series import list_series, read_sequence, read_volume
from mgmt_fast.slicewise import read_stack

AXIAL = affine_of(np.eye(3), (6,3,3), (-96,-96,-70))
TIMES = dict(RepetitionTime=500, EchoTime=10, SliceThickness=6, SpacingBetweenSlices=6, PatientName='', PatientID='')


def head(seed=0, d=24, h=64, w=64):
    "An ellipsoid of tissue with structure, in air"
    rng = np.random.default_rng(seed)
    z,y,x = np.ogrid[-1:1:d*1j,-1:1:h*1j,-1:1:w*1j]
    texture = ndimage.gaussian_filter(rng.normal(size=(d,h,w)), (0,2,2))
    return np.where(z**2+y**2+x**2<.7, 500+80*texture/texture.std(), 0).clip(0).astype(np.int16)


def as_series(dest, x=None, **el): return write_series(dest, head() if x is None else x, AXIAL, **{**TIMES, **el})


def as_nifti(dest, x=None, affine=None):
    x = head() if x is None else x
    nib.save(nib.Nifti1Image(x.transpose(2,1,0), AXIAL[:,[2,1,0,3]] if affine is None else affine), dest)
    return dest


def with_text(x):
    "Text alone, burned into the first slices"
    res = np.zeros_like(x); res[:3,2:6,2:40:2] = 1000
    return res


SPOILED = {
    'CT': (dict(Modality='CT'), 'modality CT', 'error'),
    'screenshots': (dict(Modality='OT'), 'modality OT', 'error'),
    'diffusion map': (dict(ImageType=['DERIVED','PRIMARY','DIFFUSION','ADC']), 'called T1w, but it is .*diffusion',
    'error'),
    'phase': (dict(ImageType=['ORIGINAL','PRIMARY','P','ND']), 'a phase image', 'error'),
    'projection': (dict(ImageType=['DERIVED','PRIMARY','PROJECTION IMAGE']), 'a projection', 'error'),
    'echo-planar': (dict(ScanningSequence='EP'), 'echo-planar', 'error'),
    'other times': (dict(RepetitionTime=9000, EchoTime=120, InversionTime=2500), 'are those of FLAIR', 'error'),
    'name': (dict(PatientName='SECRET^X'), 'identifiers in the header: name', 'warning')}


@pytest.mark.parametrize('case', SPOILED)
def test_headers(tmp_path, case):
    el,says,severity = SPOILED[case]
    assert not audit_series(as_series(tmp_path/'good'), 'T1w').findings
    row = audit_series(as_series(tmp_path/'bad', **el), 'T1w')
    assert pd.Series([row.findings]).str.contains(says)[0] and row.severity==severity


@pytest.mark.parametrize('modality', ['CT','CR','OT','PT'])
def test_other_modalities_are_not_read(tmp_path, modality):
    with pytest.raises(SeriesError, match=f'modality {modality}'):
        read_volume(as_series(tmp_path/'a', Modality=modality))
    read_volume(as_series(tmp_path/'b', Modality=''))


CONTENT = {
    'noise': (lambda x: np.random.default_rng(0).integers(0, 900, x.shape).astype(np.int16), 'only noise', 'error'),
    'text': (with_text, 'almost empty|a few values', 'error'),
    'labels': (lambda x: (x>0).astype(np.int16)*3, 'a few values only', 'error'),
    'constant': (lambda x: np.full_like(x, 7), 'all voxels are 7', 'error'),
    'padding': (lambda x: np.where(np.arange(64)<6, -32768, x).astype(np.int16), 'padding value, -32768', 'warning'),
    'hot voxel': (lambda x: np.where(np.arange(x.size).reshape(x.shape)==50000, 32000, x).astype(np.int16),
    'far above all others', 'warning')}


@pytest.mark.parametrize('case', CONTENT)
def test_contents(tmp_path, case):
    spoil,says,severity = CONTENT[case]
    for bad,good in ((as_series(tmp_path/'a', spoil(head())),as_series(tmp_path/'b')),
        (as_nifti(tmp_path/'a.nii', spoil(head())),as_nifti(tmp_path/'b.nii'))):
        row = audit_series(bad, 'T1w')
        assert pd.Series([row.findings]).str.contains(says)[0] and row.severity==severity
        assert not audit_series(good, 'T1w').findings


def forms(img, shift):
    img.set_qform(img.affine+np.pad([[shift]], ((0,3),(3,0))), 1)
    return img


@pytest.mark.parametrize('affine,says', [(np.eye(4),'affine is the identity'),
    (np.diag([.003,.003,.006,1]),'too small for a head'),
    (np.diag([30,30,60,1.]),'too large for a head')])
def test_places(tmp_path, affine, says):
    assert says in audit_series(as_nifti(tmp_path/'a.nii', affine=affine), 'T1w').findings


def test_forms_that_disagree(tmp_path):
    for shift in (0,.1,25):
        img = nib.load(as_nifti(tmp_path/'a.nii'))
        img = nib.Nifti1Image(np.asarray(img.dataobj), img.affine)
        nib.save(forms(img, shift), tmp_path/'b.nii')
        assert ('sform and qform disagree by up to 25 mm' in audit_series(tmp_path/'b.nii').findings)==(shift==25)


def test_one_slice_is_no_volume(tmp_path):
    with pytest.raises(SeriesError, match='3 slices or more'): read_volume(as_nifti(tmp_path/'a.nii', head()[:1]))


def test_the_odd_one_is_blamed(tmp_path):
    "Whichever of four lies elsewhere, or is smaller, it is told, and the others are not"
    for k,odd in enumerate(SEQUENCES):
        for name,change in (('elsewhere', np.array([[0,0,0,300]]+[[0]*4]*3)),
            ('size', AXIAL[:,[2,1,0,3]]*[[-.7,-.7,-.7,0]])):
            at = AXIAL[:,[2,1,0,3]]+change
            row = {s: str(as_nifti(tmp_path/f'{name}{k}{s}.nii', head(i), at if s==odd else None)) for i,
                s in enumerate(SEQUENCES)}
            df = audit_cohort(pd.DataFrame([dict(patient='p', **row)]), n_workers=0,
                progress=False).set_index('sequence')
            told = df.findings.str.contains('its head lies elsewhere|another size|too small')
            assert told.to_dict()=={s: s==odd for s in SEQUENCES}, df.findings.tolist()
        p = prepare_patient(dict(patient='p', **row), recipe=get_recipe('default', size=(8,16,16)))
        assert set(SEQUENCES)-set(p.arrays)<={odd}


def test_prepare_blames_the_odd_one_even_if_it_is_first(tmp_path):
    at = AXIAL[:,[2,1,0,3]].copy(); at[0,3] += 300
    row = {s: str(as_nifti(tmp_path/f'{s}.nii', head(i), at if not i else None)) for i,s in enumerate(SEQUENCES)}
    p = prepare_patient(dict(patient='p', **row), recipe=get_recipe('default', size=(8,16,16)))
    assert list(p.arrays)==list(SEQUENCES[1:]) and [o['sequence'] for o in p.report
        if o['level']=='error']==[SEQUENCES[0]]


@pytest.mark.parametrize('spoil', [CONTENT['hot voxel'][0], CONTENT['padding'][0],
    lambda x: np.where((np.arange(64)>60)&(np.arange(64)[:,None]>55), 32767, x).astype(np.int16)])
def test_outliers_set_neither_box_nor_window(tmp_path, spoil):
    good,bad = (prepare_patient(dict(patient='p', T1w=str(as_nifti(tmp_path/f'{i}.nii', x))), ('T1w',),
        get_recipe('default', size=(16,32,32))) for i,x in enumerate((head(),spoil(head()))))
    assert np.allclose(good.affine, bad.affine,
        atol=1e-6) and good.meta['T1w']['window'][0]==pytest.approx(bad.meta['T1w']['window'][0], rel=.2)
    assert good.meta['T1w']['window'][1]==pytest.approx(bad.meta['T1w']['window'][1], rel=.05)
    assert (good.arrays['T1w']==bad.arrays['T1w']).mean()>.9


def test_a_bug_on_one_patient_is_a_row_and_a_log(tmp_path, monkeypatch):
    import mgmt_fast.prepare as module
    monkeypatch.setenv('MGMT_FAST_LOG', str(tmp_path/'faults.log'))
    usual = module.foreground
    def breaks(vol, *a, **k):
        if vol.shape[0]==20: raise IndexError('SECRET in SECRETFILE.dcm')
        return usual(vol, *a, **k)
    monkeypatch.setattr(module, 'foreground', breaks)
    cohort = pd.DataFrame([dict(patient=f'P{i}', label=i%2,
        T1w=str(as_nifti(tmp_path/f'SECRETFILE{i}.nii', head(i, 20 if i==1 else 24)))) for i in range(3)])
    store = prepare(cohort, tmp_path/'store', 'T1w', size=(8,16,16), n_workers=1, progress=False)
    assert store.table.T1w.tolist()==[True,False,True]
    told = store.report[store.report.patient=='P1'].what.iloc[0]
    log = (tmp_path/'faults.log').read_text()
    assert 'a fault of this library while preparing (IndexError)' in told
    assert 'test_findings.py' in log and 'breaks' in log
    assert 'SECRET' not in log+store.report.to_string()


def test_a_bug_in_the_audit_is_a_row(tmp_path, monkeypatch):
    import mgmt_fast.audit as module
    monkeypatch.setenv('MGMT_FAST_LOG', str(tmp_path/'faults.log'))
    def breaks(vol): raise ZeroDivisionError('SECRET')
    monkeypatch.setattr(module, '_head_box', breaks)
    df = audit_cohort(pd.DataFrame([dict(patient='p', T1w=str(as_nifti(tmp_path/'a.nii')))]), n_workers=0,
        progress=False)
    assert 'a fault of this library while auditing' in df.findings[0]
    assert 'SECRET' not in (tmp_path/'faults.log').read_text()


def test_the_gravest_come_first(tmp_path):
    as_series(tmp_path/'in/P01/T1w', PatientName='Doe^Jane')
    as_series(tmp_path/'in/P01/FLAIR', np.full((24,64,64), 7, np.int16), **dict(RepetitionTime=9000, EchoTime=120))
    for s in ('T2w','T1wCE'): as_nifti(tmp_path/f'in/P01/{s}.nii', head(len(s)))
    audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)
    df = pd.read_csv(tmp_path/'out/audit.csv')
    assert df.severity.tolist()[:2]==['error','warning'] and df.sequence.tolist()[:2]==['FLAIR','T1w']


# ---- what real exports hold

def test_a_directory_beside_slices_is_passed_over(tmp_path):
    p = as_series(tmp_path/'a'); like = read_volume(p).numpy()
    (p/'DICOMDIR').write_bytes(b'\0'*128+b'DICM'+b'x'*99); (p/'Thumbs.db').write_bytes(b'\0x')
    assert np.array_equal(read_volume(p).numpy(), like)


@pytest.mark.parametrize('scout', [dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.7', Modality='OT',
    ImagePositionPatient=None, ImageOrientationPatient=None),
    dict(ImageOrientationPatient=[0,1,0,0,0,-1], SeriesInstanceUID='1.2.3')])
def test_one_scout_or_screenshot_is_left_out_and_told(tmp_path, scout):
    p = as_series(tmp_path/'a'); like = read_volume(p).numpy()
    (p/'Image-99.dcm').write_bytes(as_bytes(slice_dataset(head()[12], (0,0,0), (1,0,0,0,1,0), (3,3), 99, PatientID='',
        **scout)))
    vol = read_volume(p)
    assert np.array_equal(vol.numpy(), like) and vol.notes==['1 image beside the slices left out: a scout or a'
        ' screenshot']
    assert 'left out' in audit_series(p).notes and len(list_series(p))==2


def other_matrix(path, places, size=32, spacing=(6,6), **elements):
    "Images in the slices' plane with another matrix, numbered from 99"
    for n,place in enumerate(places, 99):
        ds = slice_dataset(head()[12,:size,:size].copy(), place, (1,0,0,0,1,0), spacing, n, PatientID='', **elements)
        (path/f'Image-{n}.dcm').write_bytes(as_bytes(ds))
    return path


@pytest.mark.parametrize('elements', [{}, dict(SeriesInstanceUID='1.2.9'), dict(spacing=(3,3)), dict(size=48)])
@pytest.mark.parametrize('places', [[(0,0,0)], [(-90,-90,7.5)], [(0,0,0),(0,0,99)]])
def test_a_scout_of_another_matrix_in_the_same_plane_is_left_out_and_told(tmp_path, elements, places):
    p = as_series(tmp_path/'a'); like = read_volume(p)
    vol,n = read_volume(other_matrix(p, places, **elements)),len(places)
    assert np.array_equal(vol.numpy(), like.numpy()) and np.array_equal(vol.affine, like.affine)
    assert vol.notes==[f"{n} image{'s'*(n>1)} beside the slices left out: a scout or a screenshot"]
    assert 'left out' in audit_series(p).notes


def test_many_slices_of_another_matrix_are_refused(tmp_path):
    p = other_matrix(as_series(tmp_path/'a'), [(0,0,5*i) for i in range(8)])
    with pytest.raises(SeriesError, match='differs among the slices'): read_volume(p)


@pytest.mark.parametrize('at', [0, 12, 23])
def test_a_slice_of_another_matrix_that_fills_a_place_is_no_scout(tmp_path, at):
    p = as_series(tmp_path/'a')
    files = sorted(p.iterdir(), key=lambda f: float(pydicom.dcmread(f).ImagePositionPatient[2]))
    ds = pydicom.dcmread(files[at])
    ds.Rows,ds.PixelData = 32,ds.PixelData[:len(ds.PixelData)//2]
    ds.save_as(files[at])
    with pytest.raises(SeriesError, match='Rows differs'): read_volume(p)


def test_orientations_that_differ_in_the_third_digit_are_one_volume(tmp_path):
    rng = np.random.default_rng(0)
    def jitter(d):
        return dict(ImageOrientationPatient=[f'{o:.6f}' for o in np.array([1,0,0,0,1,0])+rng.uniform(-2e-3, 2e-3, 6)])
    assert read_volume(as_series(tmp_path/'a', each=jitter)).shape==(24,64,64)


def test_packed_slices_are_refused_by_name(tmp_path):
    p = as_series(tmp_path/'a'); (p/'Image-25.dcm.gz').write_bytes(b'\x1f\x8b')
    with pytest.raises(SeriesError, match='gunzip'): read_volume(p)


def test_pipes_do_not_hold_anything_up(tmp_path):
    p = as_series(tmp_path/'in/P01/T1w'); os.mkfifo(p/'pipe')
    assert read_volume(p).shape==(24,64,64)
    os.mkfifo(p/'Image-99.dcm')
    with pytest.raises(SeriesError, match='a pipe'): read_volume(p)
    audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)


def test_a_coding_that_nobody_knows_is_not_called_damage(tmp_path):
    for f in as_series(tmp_path/'a').iterdir():
        ds = pydicom.dcmread(f)
        ds.PixelData = pydicom.encaps.encapsulate([b'\xff\x0a'+b'\0'*64]); ds['PixelData'].VR = 'OB'
        ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.4.100' # MPEG-2
        ds.save_as(f)
    with pytest.raises(SeriesError, match='gdcmconv -w'): read_volume(tmp_path/'a')


def test_a_table_of_intensities_is_refused(tmp_path):
    lut = item(LUTDescriptor=[4,0,16], LUTData=struct.pack('<4H', 0, 1, 4, 9), ModalityLUTType='US')
    with pytest.raises(SeriesError, match='Modality LUT'): read_volume(as_series(tmp_path/'a', ModalityLUTSequence=lut))


def test_frames_that_are_not_announced_are_found(tmp_path):
    p = as_series(tmp_path/'a')
    ds = pydicom.dcmread(p/'Image-3.dcm'); ds.PixelData = ds.PixelData*2; ds.save_as(p/'Image-3.dcm')
    assert 'holds pixels of 2.0 frames and says 1' in audit_series(p).findings
    ds = enhanced(head(), AXIAL); ds.NumberOfFrames = 20
    (tmp_path/'e.dcm').write_bytes(as_bytes(ds))
    with pytest.raises(SeriesError, match='NumberOfFrames says 20 and 24'): read_volume(tmp_path/'e.dcm')


def test_the_long_echo_is_t2(tmp_path):
    p = tmp_path/'a'
    for i,te in enumerate((20,90)): as_series(p, head(i), EchoTime=te, RepetitionTime=3000, name=f'{te}-{{}}.dcm')
    vol = read_sequence(dict(T2w=p), 'T2w')
    assert np.array_equal(vol.numpy(), head(1)) and 'the long one (90 ms)' in vol.notes[0]
    assert np.array_equal(read_sequence(dict(T2w=p, T2w_index=0), 'T2w').numpy(), head(0))
    r = prepare_patient(dict(patient='p', T2w=str(p)), ('T2w',), get_recipe('default', size=(8,16,16)))
    assert 'T2w' in r.arrays and any('long one' in o['what'] for o in r.report)
    with pytest.raises(SeriesError, match='choose one with index='): read_volume(p)


@pytest.mark.parametrize('recipe', ['published','winner'])
def test_the_long_echo_is_t2_slice_by_slice_too(tmp_path, recipe):
    for i,te in enumerate((20,90)):
        for dest in ('both',str(te)):
            as_series(tmp_path/dest, head(i), EchoTime=te, RepetitionTime=3000, name=f'{te}-{{}}.dcm')
    r = get_recipe(recipe, size=(8,16,16))
    def prepared(dest, **more):
        return prepare_patient(dict(patient='p', T2w=str(tmp_path/dest), **more), ('T2w',), r)
    both,alone,short = prepared('both'),prepared('90'),prepared('both', T2w_index=0)
    assert np.array_equal(both.arrays['T2w'], alone.arrays['T2w'])
    assert any('long one (90 ms)' in o['what'] for o in both.report)
    assert np.array_equal(short.arrays['T2w'], prepared('20').arrays['T2w'])
    for path in ('both','90'): assert np.array_equal(read_stack(tmp_path/path, sequence='T2w'), head(1))
    with pytest.raises(SeriesError, match='choose one with index='): read_stack(tmp_path/'both')


def test_analyze_and_other_formats(tmp_path):
    nib.save(nib.Nifti1Pair(head().transpose(2,1,0), AXIAL[:,[2,1,0,3]]), tmp_path/'a.img')
    assert np.array_equal(read_volume(tmp_path/'a.hdr').numpy(), head())
    nib.save(nib.AnalyzeImage(head().transpose(2,1,0), np.diag([3.,3,6,1])), tmp_path/'b.img')
    with pytest.raises(SeriesError, match='which side is left'): read_volume(tmp_path/'b.hdr')


def test_formats_of_itk(tmp_path):
    try: import SimpleITK as sitk
    except ImportError:
        (tmp_path/'a.nrrd').write_bytes(b'NRRD0004\n')
        with pytest.raises(SeriesError, match='needs SimpleITK'): read_volume(tmp_path/'a.nrrd')
        return
    img = sitk.GetImageFromArray(head())
    img.SetSpacing((3.,3.,6.)); img.SetOrigin((-90.,-90.,-60.))
    for suffix in ('nrrd','mha'):
        sitk.WriteImage(img, str(tmp_path/f'a.{suffix}'))
        v = read_volume(tmp_path/f'a.{suffix}')
        assert np.array_equal(v.numpy(), head()) and np.allclose(v.world((1,1,1)), (87,87,-54))
