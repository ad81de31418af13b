"Writes small DICOM series in every shape and state that the tests of reading need."
import copy, tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, generate_frames
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

EXPLICIT = '1.2.840.10008.1.2.1'
NATIVE = {'implicit': '1.2.840.10008.1.2', 'explicit': EXPLICIT, 'deflated': '1.2.840.10008.1.2.1.99',
    'big_endian': '1.2.840.10008.1.2.2'}
CODED = {'rle': '1.2.840.10008.1.2.5', 'jpeg_lossless': '1.2.840.10008.1.2.4.70',
    'jpeg_lossless_14': '1.2.840.10008.1.2.4.57', 'jpeg_ls': '1.2.840.10008.1.2.4.80',
    'jpeg_2000': '1.2.840.10008.1.2.4.90'}
CODINGS = [*NATIVE, *CODED]


def _encode(ds, kind):
    "The one frame of `ds`, coded by gdcm"
    import gdcm
    with tempfile.TemporaryDirectory() as td:
        a,b = f'{td}/a.dcm',f'{td}/b.dcm'
        ds.save_as(a, enforce_file_format=True)
        r = gdcm.ImageReader(); r.SetFileName(a); assert r.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
        change.SetInput(r.GetImage())
        assert change.Change()
        w = gdcm.ImageWriter()
        w.SetFileName(b)
        w.SetFile(r.GetFile())
        w.SetImage(change.GetOutput())
        assert w.Write()
        return next(generate_frames(pydicom.dcmread(b).PixelData, number_of_frames=1))


def transcode(ds, coding):
    "The data set `ds` (explicit little-endian) in a compressed coding; gdcm codes what pydicom cannot"
    if coding in ('rle','jpeg_2000'): ds.compress(CODED[coding])
    else:
        kind = dict(jpeg_lossless='JPEGLosslessProcess14_1', jpeg_lossless_14='JPEGLosslessProcess14',
            jpeg_ls='JPEGLSLossless')[coding]
        n = int(ds.get('NumberOfFrames') or 1)
        x = np.frombuffer(ds.PixelData, f"{'ui'[ds.PixelRepresentation]}{ds.BitsAllocated//8}",
            n*ds.Rows*ds.Columns).reshape(n, ds.Rows, ds.Columns)
        ds.PixelData = encapsulate([_encode(slice_dataset(
            o, (0,0,0), (1,0,0,0,1,0), (1,1), BitsStored=ds.BitsStored, HighBit=ds.HighBit), kind) for o in x])
        ds['PixelData'].VR,ds.file_meta.TransferSyntaxUID = 'OB',CODED[coding]
    ds.save_as(f:=BytesIO(), enforce_file_format=True)
    return f.getvalue()


def as_bytes(ds, coding='explicit'):
    if coding in CODED: return transcode(ds, coding)
    big = coding=='big_endian'
    ds.file_meta.TransferSyntaxUID = NATIVE[coding]
    if big and ds.BitsAllocated>8:
        ds.PixelData = np.frombuffer(ds.PixelData, f'<u{ds.BitsAllocated//8}').byteswap().tobytes()
    f = BytesIO()
    pydicom.dcmwrite(f, ds, enforce_file_format=True)
    return f.getvalue()


def slice_dataset(x, ipp, iop, spacing, n=1, **elements):
    "One MR image; `elements` are set last, `None` deletes"
    ds = Dataset(); ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = EXPLICIT
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.4'
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(n), str(ipp)])
    ds.SeriesInstanceUID,ds.StudyInstanceUID,ds.Modality,ds.PatientID,ds.InstanceNumber = '1.2.3','1.2','MR','00000',n
    ds.ImagePositionPatient,ds.ImageOrientationPatient,ds.PixelSpacing = ([f'{o:.10g}'[:16] for o in np.asarray(v)]
        for v in (ipp, iop, spacing))
    ds.SliceThickness,ds.SpacingBetweenSlices = 99,77
    ds.Rows,ds.Columns = map(int, x.shape[-2:])
    ds.SamplesPerPixel,ds.PhotometricInterpretation = 1,'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 8*x.dtype.itemsize
    ds.HighBit,ds.PixelRepresentation = ds.BitsStored-1,int(x.dtype.kind=='i')
    ds['PixelData'] = pydicom.DataElement('PixelData', 'OB' if x.dtype.itemsize==1 else 'OW',
        x.tobytes()+b'\0'*(x.nbytes%2))
    for k,v in elements.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    return ds


def datasets(x, affine, order=None, each=lambda d: {}, **elements):
    "The slices of `x` (D,H,W) at `affine` (RAS+), in the order in which files are to be numbered"
    lps = np.diag([-1.,-1,1,1])@affine
    dh,dw = np.linalg.norm(lps[:3,1:3], axis=0)
    iop = np.r_[lps[:3,2]/dw, lps[:3,1]/dh]
    return [slice_dataset(x[d], lps[:3,3]+d*lps[:3,0], iop, (dh,dw), n+1, **{**elements, **each(d)})
        for n,d in enumerate(range(len(x)) if order is None else order)]


def write(dest, sets, coding='explicit', name='Image-{}.dcm'):
    dest = Path(dest); dest.mkdir(parents=True, exist_ok=True)
    for n,ds in enumerate(sets): (dest/name.format(n+1)).write_bytes(as_bytes(ds, coding))
    return dest


def write_series(dest, x, affine, coding='explicit', name='Image-{}.dcm', **kwargs):
    return write(dest, datasets(x, affine, **kwargs), coding, name)


def item(**elements):
    ds = Dataset()
    for k,v in elements.items(): setattr(ds, k, v)
    return Sequence([ds])


def enhanced(x, affine, order=None, times=1):
    "Slices of `x` (T*D,H,W) as one enhanced multi-frame data set, geometry in the functional groups only"
    n = len(x)//times
    frames = datasets(x[:n], affine)*times
    ds = copy.deepcopy(frames[0])
    for k in ('ImagePositionPatient','ImageOrientationPatient','PixelSpacing','SliceThickness','SpacingBetweenSlices'):
        delattr(ds, k)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.4.1'
    ds.NumberOfFrames = len(x)
    order = range(len(x)) if order is None else order
    first = frames[0]
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=first.ImageOrientationPatient)
    shared.PixelMeasuresSequence = item(PixelSpacing=first.PixelSpacing)
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for i in order:
        g = Dataset()
        g.PlanePositionSequence = item(ImagePositionPatient=frames[i].ImagePositionPatient)
        g.FrameContentSequence = item(TemporalPositionIndex=int(i)//n+1)
        groups.append(g)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    ds.PixelData = np.ascontiguousarray(x[list(order)]).tobytes()
    return ds


def affine_of(rotation, spacing, origin=(0,0,0)):
    """RAS+ affine of axes (D,H,W): `rotation` a proper rotation in patient (LPS) axes whose columns are W, H and the
    normal"""
    w,h,d = np.asarray(rotation).T
    res = np.eye(4)
    res[:3] = np.column_stack([d*spacing[0], h*spacing[1], w*spacing[2], origin])
    return np.diag([-1.,-1,1,1])@res
