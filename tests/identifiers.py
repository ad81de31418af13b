"Twenty identifiers that are planted wherever a scan or a table may hold one, and looked for in all that is written."
import gzip
import zipfile

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom

PLANTED = dict(PatientName='Quillfeather^Zebedee', PatientID='PID5551212', PatientBirthDate='19530219',
    PatientAddress='Larkspur Mews', OtherPatientIDs='OPID777001', InstitutionName='Saint Wombat Hospital',
    ReferringPhysicianName='Draxington^Hugobert', OperatorsName='Ponsonby^Kaythorpe', AccessionNumber='ACC909090',
    StudyDescription='head of Thistlewood', PatientComments='wears a monocle', StudyDate='20191127',
    DeviceSerialNumber='DSN4711', StationName='WOMBATMR3')
UID,PRIVATE,FILE,FOLDER,DESCRIP,AUX,EXTENSION,COLUMN = ('1.2.826.0.1.8675309','Zebbie','MARCHBANKS','Featherstonehaugh',
    'Cholmondeley','Mainwaring','Beauchamp','Wriothesley')
NEEDLES = [o for v in PLANTED.values() for o in v.split('^')]+[UID,PRIVATE,FILE,FOLDER,DESCRIP,AUX,EXTENSION,COLUMN]


def plant_slice(path, uids=True):
    "Identifiers in the header of a slice, in its private elements and in its name; `uids`: and another exam's UIDs"
    ds = pydicom.dcmread(path)
    for k,v in PLANTED.items(): setattr(ds, k, v)
    if uids: ds.StudyInstanceUID,ds.FrameOfReferenceUID,ds.SeriesInstanceUID = UID+'.1',UID+'.2',UID+'.3'
    ds.private_block(0x11, 'WOMBAT', create=True).add_new(1, 'LO', PRIVATE)
    n = path.stem.partition('-')[2] or path.stem
    ds.save_as(path.with_name(f'{FILE}.MR.{n}.dcm'))
    path.unlink()


def plant_nifti(path):
    "Text in the header of a NIfTI image"
    img = nib.load(path)
    img = nib.Nifti1Image(np.array(img.dataobj), img.affine, img.header)
    img.header['descrip'],img.header['aux_file'] = DESCRIP,AUX
    img.header.extensions.append(nib.nifti1.Nifti1Extension('comment', EXTENSION.encode()))
    nib.save(img, path)


def plant_table(path):
    "Columns beyond those that are asked for"
    pd.read_csv(path, dtype=str).assign(Surname=COLUMN, Note=COLUMN).to_csv(path, index=False)


def found(raw):
    "The identifiers that bytes hold"
    text = raw.decode('latin-1').lower()
    return [o for o in NEEDLES if o.lower() in text]


def found_in(folder):
    "The identifiers that a folder's files hold, or their names: {file: identifiers}"
    files = [p for p in folder.rglob('*') if p.is_file()]
    return {p.name: o for p in files if (o := found(unpacked(p)+p.name.encode()))}


def unpacked(path):
    "The bytes of a file, and of what is compressed in it"
    raw = path.read_bytes()
    if path.suffix=='.gz': raw += gzip.decompress(raw)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z: raw += b''.join(map(z.read, z.namelist()))
    return raw
