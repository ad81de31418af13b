"Nothing in a scan's header that could name a patient reaches a store, a printed line or an error."
import logging
from pathlib import Path

import numpy as np, pandas as pd, pydicom, pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import MRImageStorage, ExplicitVRLittleEndian

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError
from mgmt_fast.prepare import prepare
from mgmt_fast.quality import audit_series
from mgmt_fast.series import list_series, read_volume

uid = '1.2.826.0.1.3680043.10.54.8675309'
secrets = dict(PatientName='Quillfeather^Zebedee', PatientID='PID-5551212', PatientBirthDate='19530219',
    PatientAddress='7 Larkspur Mews', OtherPatientIDs='OPID-777001', PatientTelephoneNumbers='0123-424242',
    PatientMotherBirthName='Thistlewood', InstitutionName='Saint Wombat Hospital', ReferringPhysicianName='Drax^Hugo',
    OperatorsName='Ponsonby^Kay', AccessionNumber='ACC-909090', StudyID='STU-31337',
    PatientComments='wears a monocle', StudyDescription='head of Quillfeather', SeriesDescription='ask Ponsonby',
    ProtocolName='Wombat brain', StudyDate='20191127', SeriesDate='20191128', AcquisitionDate='20191129',
    DeviceSerialNumber='DSN-4711', StationName='WOMBATMR3', ImageComments='monocle on', ContrastBolusAgent='Gadowombat')
needles = [p for v in secrets.values() for p in (v.split('^') if '^' in v else [v])] + [uid,'Zebbie']


def ellipsoid(d, n=48):
    z,y,x = np.ogrid[-1:1:d*1j,-1:1:n*1j,-1:1:n*1j]
    return (((z**2+y**2+x**2)<.7)*(400+100*np.cos(5*y)*np.cos(7*x+3*z))).astype(np.uint16)


def series(folder, d=10, **changes):
    "DICOM slices full of identifiers; returns their paths"
    folder.mkdir(parents=True)
    paths = []
    for i,a in enumerate(ellipsoid(d)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID,meta.MediaStorageSOPInstanceUID = MRImageStorage,f'{uid}.{i+1}'
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b'\0'*128)
        for k,v in secrets.items(): setattr(ds, k, v)
        ds.SOPClassUID,ds.SOPInstanceUID = MRImageStorage,f'{uid}.{i+1}'
        ds.StudyInstanceUID,ds.SeriesInstanceUID,ds.FrameOfReferenceUID = f'{uid}.0',f'{uid}.7',f'{uid}.8'
        ds.Modality,ds.InstanceNumber,ds.SeriesNumber = 'MR',i+1,3
        ds.Rows,ds.Columns = a.shape
        ds.BitsAllocated,ds.BitsStored,ds.HighBit = 16,16,15
        ds.PixelRepresentation,ds.SamplesPerPixel,ds.PhotometricInterpretation = 0,1,'MONOCHROME2'
        ds.PixelSpacing,ds.SliceThickness,ds.ImageOrientationPatient,ds.ImagePositionPatient = [4,4],12,[1,0,0,0,1,
            0],[-96,-96,12*i]
        ds.private_block(0x11, 'WOMBAT', create=True).add_new(1, 'LO', 'Zebbie')
        ds.PixelData = a.tobytes()
        for k,v in changes.items(): setattr(ds, k, v)
        paths.append(folder/f'Image-{i+1}.dcm')
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def edit(path, **changes):
    ds = pydicom.dcmread(path)
    for k,v in changes.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    ds.save_as(path)


def cut(path): path.write_bytes(path.read_bytes()[:-500])
def overwrite(path): path.write_bytes(path.read_bytes().replace(b'DICM', b'XXXX', 1))
def raw(path, old, new): path.write_bytes(path.read_bytes().replace(old, new))


damages = dict(
    two_patients=lambda p: edit(p[3], PatientID='OPID-777001'),
    two_series=lambda p: [edit(o, SeriesInstanceUID=uid+'.9', SeriesDescription='Ponsonby again') for o in p[:4]],
    twice=lambda p: edit(p[3], ImagePositionPatient=[-96,-96,48]),
    gap=lambda p: p[4].unlink(),
    cut=lambda p: cut(p[2]),
    no_place=lambda p: edit(p[2], ImagePositionPatient=None),
    no_pixels=lambda p: edit(p[2], PixelData=None),
    other_size=lambda p: edit(p[2], Rows=24),
    colour=lambda p: [edit(o, PhotometricInterpretation='RGB', SamplesPerPixel=3) for o in p],
    odd_interpretation=lambda p: [edit(o, PhotometricInterpretation='WOMBATMR3') for o in p],
    spacing_is_text=lambda p: [raw(o, b'4\\4 ', b'Drax') for o in p],
    no_dicom=lambda p: overwrite(p[2]),
    blank=lambda p: [edit(o, PixelData=bytes(48*48*2)) for o in p],
    bad_slope=lambda p: edit(p[2], RescaleSlope='0', RescaleIntercept='0'),
    mosaic=lambda p: [edit(o, ImageType=['ORIGINAL','PRIMARY','MOSAIC','ZEBBIE']) for o in p],
    few=lambda p: [o.unlink() for o in p[2:]],
)


def leaks(text):
    if isinstance(text, bytes): text = text.decode('latin-1')
    return [o for o in needles if o.lower() in text.lower()]


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "A patient for every kind of damage, in T1w; their other sequences are sound"
    root = tmp_path_factory.mktemp('cohort')
    for i,damage in enumerate(damages.values()):
        for s in ('FLAIR','T1w'): paths = series(root/'train'/f'{i:05d}'/s)
        damage(paths)
    pd.DataFrame({'BraTS21ID':[f'{i:05d}' for i in range(len(damages))],
        'MGMT_value':[i%2 for i in range(len(damages))]}).to_csv(root/'train_labels.csv', index=False)
    return kaggle_cohort(root)


def test_the_test_itself_would_see_a_leak(cohort):
    assert leaks((Path(cohort.FLAIR[0])/'Image-1.dcm').read_bytes())==needles


@pytest.mark.parametrize('i', range(len(damages)), ids=damages)
def test_errors_and_audits_name_nobody(cohort, i, capfd, caplog):
    path,said = cohort.T1w[i],[]
    for f in (read_volume, list_series, audit_series):
        try: said.append(str(pd.DataFrame(f(path)).to_dict() if f is not read_volume else f(path)))
        except MGMTError as e:
            while e is not None:
                said.append(str(e))
                e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    assert not leaks('\n'.join([*said, *capfd.readouterr(), caplog.text])), said


def test_nothing_of_a_header_reaches_a_store(cohort, tmp_path, capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        store = prepare(cohort, tmp_path/'store', sequences=('FLAIR','T1w'), size=(8,32,32), n_workers=1)
    assert store.table.FLAIR.all() and (store.report.level=='error').sum()>=10
    files = [p for p in (tmp_path/'store').rglob('*') if p.is_file()]
    assert {p.suffix for p in files}=={'.npy','.json'}
    for p in files: assert not leaks(p.read_bytes()), p.name
    assert not leaks('\n'.join([*capfd.readouterr(), caplog.text, store.report.to_csv(), repr(store),
        store.table.to_csv()]))


def test_a_store_does_not_tell_where_the_scans_lay(cohort, tmp_path):
    "Stores are passed on; folders are often named after people"
    prepare(cohort, tmp_path/'store', sequences=('FLAIR','T1w'), size=(8,32,32), n_workers=1, progress=False)
    where = str(cohort.T1w[0]).split('/train/')[0]
    for p in (tmp_path/'store').rglob('*'):
        if p.is_file(): assert where.encode() not in p.read_bytes(), p.name
