"Series over time as scanners and copies leave them: every way of telling times, and what is refused by which name."
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from mgmt_fast.cohort import cohort_report
from mgmt_fast.core import Budget, rng_for
from mgmt_fast.dicom import SeriesError
from mgmt_fast.dsc import DSC_FINDINGS, DSCError, Series4D, check_dsc, dsc_findings, even_times, read_dsc
from mgmt_fast.dsc_phantom import dsc_patients, render_dsc, write_dsc
from mgmt_fast.perfusion_cohort import add_perfusion, audit_dsc, find_dsc

DATA = Path(os.environ.get('MGMT_FAST_DATA', '/none'))/'dicom'


@pytest.fixture(scope='module')
def sim(): return render_dsc(dsc_patients(4, seed=3).iloc[0], slices=5, size=40, frames=44)


@pytest.fixture
def small():
    rng = np.random.default_rng(0)
    affine = np.array([[0,0,-3.,40],[0,-3,0,40],[5,0,0,-10],[0,0,0,1]])
    data = rng.integers(0, 4000, (14,4,6,7)).astype(np.int32)
    return Series4D(data, affine, np.arange(14)*1.5, te=30., tr=1500., flip=60., dose=15.)


def edit(folder, change):
    for i,p in enumerate(sorted(Path(folder).glob('*.dcm'))):
        ds = pydicom.dcmread(p)
        change(i, ds)
        ds.save_as(p)


def names(series): return [o.name for o in series.findings]


@pytest.mark.parametrize('told_by', ['AcquisitionTime', 'TriggerTime', None])
def test_slices_in_any_order_of_files(small, tmp_path, told_by):
    write_dsc(small, tmp_path/'a', told_by=told_by)
    order = rng_for(0, 'order').permutation(56)
    for i,p in zip(order, sorted((tmp_path/'a').glob('*.dcm'))): p.rename(tmp_path/'a'/f'x{i}.dcm')
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times, atol=1e-6)
    assert (back.te, back.tr, back.flip, back.dose)==(30, 1500, 60, 15)


def temporal(i, ds):
    ds.TemporalPositionIdentifier = i//4+1
    ds.InstanceNumber = 1


def acquisitions(i, ds): ds.AcquisitionNumber = i//4+1
def reference(i, ds): ds.FrameReferenceTime = 1000+1500.*(i//4)


@pytest.mark.parametrize('change', [temporal, acquisitions, reference])
def test_every_header_that_tells_times(small, tmp_path, change):
    write_dsc(small, tmp_path/'a', told_by=None)
    edit(tmp_path/'a', change)
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times, atol=1e-6)


def test_midnight(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)

    def clock(i, ds):
        s = (86395+1.5*(i//4))%86400
        ds.AcquisitionTime = f'{int(s)//3600:02}{int(s)//60%60:02}{s%60:05.2f}'
        ds.AcquisitionNumber = i//4+1
    edit(tmp_path/'a', clock)
    back = read_dsc(tmp_path/'a')
    assert np.allclose(back.times, small.times) and np.array_equal(back.data, small.data)


def test_interleaved_slices(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)
    part = [0,2,1,3]
    edit(tmp_path/'a', lambda i,ds: setattr(ds, 'TriggerTime', 1500*(i//4)+375*part[i%4]))
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times)


@pytest.mark.parametrize('told_by', ['AcquisitionTime', 'TriggerTime'])
@pytest.mark.parametrize('lost', [[0], [7], [13], [5,6]])
def test_a_lost_frame_is_a_gap(small, tmp_path, told_by, lost):
    write_dsc(small, tmp_path/'a', told_by=told_by)
    for t in lost:
        for d in range(4): (tmp_path/'a'/f'{4*t+d+1:05}.dcm').unlink()
    back = read_dsc(tmp_path/'a')
    kept = np.delete(np.arange(14), lost)
    assert np.array_equal(back.data, small.data[kept])
    assert np.allclose(back.times, small.times[kept]-small.times[kept[0]], atol=1e-5)
    assert names(back)==([] if lost in ([0],[13]) else ['uneven_times'])
    assert np.allclose(np.diff(even_times(back).times), 1.5)


def test_many_lost_slices_are_refused(small, tmp_path):
    write_dsc(small, tmp_path/'a')
    for t in range(0, 14, 2): (tmp_path/'a'/f'{4*t+2:05}.dcm').unlink()
    with pytest.raises(DSCError, match='frames_missing'): read_dsc(tmp_path/'a')


def test_lost_slices_without_times_are_refused(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)
    (tmp_path/'a'/'00009.dcm').unlink()
    with pytest.raises(DSCError, match='frames_missing'): read_dsc(tmp_path/'a')


def test_a_folder_copied_into_itself(small, tmp_path):
    write_dsc(small, tmp_path/'a')
    for p in list((tmp_path/'a').glob('*.dcm')): shutil.copy(p, p.with_name('copy of '+p.name))
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and names(back)==['doubles']


def saved_again(folder, which, keeps_number=True):
    "Give some images a copy with an instance UID of its own"
    for i,p in enumerate(sorted(Path(folder).glob('*.dcm'))):
        if not which(i//4): continue
        ds = pydicom.dcmread(p)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        if not keeps_number: ds.InstanceNumber += 1000
        ds.save_as(p.with_name(f'again{i}.dcm'))


@pytest.mark.parametrize('keeps_number', [True, False])
@pytest.mark.parametrize('which', [lambda t: t in (5,9), lambda t: True])
@pytest.mark.parametrize('change', [None, temporal])
def test_images_that_were_saved_again(small, tmp_path, change, which, keeps_number):
    write_dsc(small, tmp_path/'a', told_by='AcquisitionTime')
    if change: edit(tmp_path/'a', change)
    saved_again(tmp_path/'a', which, keeps_number)
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and names(back)==['doubles']
    assert np.allclose(back.times, small.times, atol=1e-6)


def test_slices_with_times_of_their_own_saved_again(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)
    edit(tmp_path/'a', lambda i,ds: setattr(ds, 'TriggerTime', 1500.5*(i//4)+375*(i%4)))
    saved_again(tmp_path/'a', lambda t: True, keeps_number=False)
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and names(back)==['doubles']


def test_two_frames_in_one_whole_second_are_no_doubles(small, tmp_path):
    write_dsc(small._replace(tr=700.), tmp_path/'a', told_by=None)
    edit(tmp_path/'a', lambda i,ds: setattr(ds, 'AcquisitionTime', f'1200{int(.7*(i//4)):02}'))
    back = read_dsc(tmp_path/'a')
    assert len(back.data)==14 and names(back)==['times_from_tr'] and np.isclose(back.dt, .7)


@pytest.mark.parametrize('lost', [range(28,32), [29]]) # a whole time point, or one of its slices
@pytest.mark.parametrize('dt', [None, 1.5])
def test_a_lost_frame_is_a_gap_without_times(small, tmp_path, lost, dt):
    write_dsc(small, tmp_path/'a', told_by=None)
    edit(tmp_path/'a', temporal)
    for i in lost: (tmp_path/'a'/f'{i+1:05}.dcm').unlink()
    back = read_dsc(tmp_path/'a', dt=dt)
    assert np.allclose(back.times, np.delete(small.times, 7)) and 'uneven_times' in names(back)


def test_a_lost_time_point_is_a_gap_in_instance_numbers(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)
    for i in range(28, 32): (tmp_path/'a'/f'{i+1:05}.dcm').unlink()
    assert names(read_dsc(tmp_path/'a'))==['times_from_tr','uneven_times']


def test_midnight_between_slices(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)

    def clock(i, ds):
        s = (86392+.375*i)%86400
        ds.AcquisitionTime = f'{int(s)//3600:02}{int(s)//60%60:02}{s%60:06.3f}'
    edit(tmp_path/'a', clock)
    back = read_dsc(tmp_path/'a')
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times) and not names(back)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DT")
def test_a_date_that_was_taken_out(small, tmp_path):
    write_dsc(small, tmp_path/'a.dcm', enhanced=True)
    ds = pydicom.dcmread(tmp_path/'a.dcm')
    for i,o in enumerate(ds.PerFrameFunctionalGroupsSequence):
        o.FrameContentSequence[0].FrameAcquisitionDateTime = f'000000001200{int(1.5*(i//4)):02}.{5*(i//4%2)}'
    ds.save_as(tmp_path/'a.dcm')
    back = read_dsc(tmp_path/'a.dcm')
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times)


def offsets(i, ds): ds.ImagePositionPatient = [ds.ImagePositionPatient[0]+6*(i>=28),*ds.ImagePositionPatient[1:]]
def parts(i, ds): ds.ImageType = ['ORIGINAL','PRIMARY','MP'[i//4%2]]
def sizes(i, ds): ds.PixelSpacing = [3+(i>=28),3]


@pytest.mark.parametrize('change', [offsets, parts, sizes])
def test_images_that_form_no_series(small, tmp_path, change):
    write_dsc(small, tmp_path/'a')
    edit(tmp_path/'a', change)
    with pytest.raises(DSCError, match='several_series'): read_dsc(tmp_path/'a')


def test_two_patients_are_refused(small, tmp_path):
    write_dsc(small, tmp_path/'a')
    edit(tmp_path/'a', lambda i,ds: setattr(ds, 'PatientID', f'ZEBBIE{i%2}'))
    with pytest.raises(SeriesError, match='more than one patient') as e: read_dsc(tmp_path/'a')
    assert 'ZEBBIE' not in str(e.value)


def test_headers_that_differ_by_rounding(small, tmp_path):
    write_dsc(small, tmp_path/'a')

    def rounded(i, ds):
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2],ds.ImagePositionPatient[2]+.02*(i%3)]
        ds.ImageOrientationPatient = [1-1e-6*(i%2),*ds.ImageOrientationPatient[1:]]
    edit(tmp_path/'a', rounded)
    assert np.array_equal(read_dsc(tmp_path/'a').data, small.data)


def test_blank_frames_are_left_out(sim, tmp_path):
    x = sim.series.data.copy()
    x[[0,30]] = 0
    write_dsc(sim.series._replace(data=x), tmp_path/'a')
    back = read_dsc(tmp_path/'a')
    assert names(back)==['frames_missing','uneven_times'] and len(back.data)==42
    assert np.isclose(np.diff(back.times).max(), 2*back.dt) and back.times[0]==0


def test_two_echoes_and_two_series_are_refused(small, tmp_path):
    for k,value in (('EchoTime','3{}'), ('SeriesInstanceUID','1.2.{}')):
        shutil.rmtree(tmp_path/'a', ignore_errors=True)
        write_dsc(small, tmp_path/'a')
        edit(tmp_path/'a', lambda i,ds: setattr(ds, k, value.format(i%2)))
        with pytest.raises(DSCError, match='several_series'): read_dsc(tmp_path/'a')


def test_one_slice(small, tmp_path):
    write_dsc(small._replace(data=small.data[:,:1]), tmp_path/'a')
    with pytest.raises(DSCError, match='one_slice'): read_dsc(tmp_path/'a')


def test_no_times_at_all(small, tmp_path):
    write_dsc(small, tmp_path/'a', told_by=None)
    edit(tmp_path/'a', lambda i,ds: delattr(ds, 'RepetitionTime'))
    with pytest.raises(DSCError, match='times_unknown.*dt='): read_dsc(tmp_path/'a')
    assert read_dsc(tmp_path/'a', dt=2).dt==2


def test_no_echo_time(small, tmp_path):
    write_dsc(small, tmp_path/'a')
    edit(tmp_path/'a', lambda i,ds: delattr(ds, 'EchoTime'))
    assert names(read_dsc(tmp_path/'a'))==['no_echo_time'] and names(read_dsc(tmp_path/'a', te=25))==[]


def test_enhanced(small, tmp_path):
    back = read_dsc(write_dsc(small, tmp_path/'e.dcm', enhanced=True))
    assert np.array_equal(back.data, small.data) and np.allclose(back.times, small.times) and names(back)==[]
    back = read_dsc(write_dsc(small, tmp_path/'f.dcm', enhanced=True, told_by=None))
    assert np.allclose(back.times, small.times) and names(back)==['times_from_tr']


def test_errors_name_no_file_and_no_patient(small, tmp_path):
    write_dsc(small, tmp_path/'a', patient='ZEBBIE^ANNA')
    for t in range(0, 14, 2): (tmp_path/'a'/f'{4*t+2:05}.dcm').unlink()
    with pytest.raises(DSCError) as e: read_dsc(tmp_path/'a')
    assert 'ZEBBIE' not in str(e.value) and '.dcm' not in str(e.value)


def spoiled(sim, name):
    "A series with one fault"
    s,x = sim.series,sim.series.data
    if name=='no_baseline': return s._replace(data=x[16:], times=s.times[:-16])
    if name=='bolus_cut_off': return s._replace(data=x[:20], times=s.times[:20])
    if name=='no_bolus': return s._replace(data=x[:14], times=s.times[:14])
    if name=='dce': return s._replace(data=x[:1]+np.cumsum(np.clip(x[:1]-x, 0, None)//20, 0), te=2.)
    gone = range(20,25)
    if name=='uneven_times': return s._replace(data=np.delete(x, gone, 0), times=np.delete(s.times, gone))


@pytest.mark.parametrize('name', ['no_baseline', 'bolus_cut_off', 'no_bolus', 'dce'])
def test_unfit_signals_are_refused_by_name(sim, name):
    with pytest.raises(DSCError, match=f'^{name}: '): check_dsc(spoiled(sim, name))


def test_a_gap_in_the_bolus_is_refused(sim, tmp_path):
    s = spoiled(sim, 'uneven_times')
    back = read_dsc(write_dsc(s, tmp_path/'a'))
    with pytest.raises(DSCError, match='^uneven_times: '): check_dsc(back)


def test_every_name_is_in_the_table():
    text = (Path(__file__).parent.parent/'mgmt_fast/dsc.py').read_text()
    used = set(re.findall(r"Finding\('(\w+)'", text))|set(re.findall(r'DSCError\(f?"(\w+):', text))
    assert used<=set(DSC_FINDINGS)


def test_phantoms_are_sound():
    for i,p in dsc_patients(4, seed=5).iterrows(): assert check_dsc(render_dsc(p, slices=6, size=48).series)==[]


@pytest.mark.real
def test_fmri_is_no_dsc():
    with pytest.raises(DSCError, match='no_bolus'): check_dsc(read_dsc(DATA/'dcm_qa_nih'/'GE_mr_0004_fmri'))


@pytest.mark.real
def test_mosaics_over_time(tmp_path):
    for i in range(12):
        ds = pydicom.dcmread(DATA/'dcm_qa_ts'/'In'/'1.dcm')
        ds.SOPInstanceUID += f'.{i}'
        ds.InstanceNumber,ds.AcquisitionNumber,ds.AcquisitionTime = i+1,i+1,f'1349{35+1.5*i:09.6f}'
        ds.save_as(tmp_path/f'{11-i}.dcm')
    s = read_dsc(tmp_path)
    assert s.data.shape==(12,35,64,64) and np.allclose(s.times, 1.5*np.arange(12)) and s.te==30
    assert (s.data==s.data[0]).all() and s.data[0].any()
    spacing = np.linalg.norm(s.affine[:3,:3], axis=0)
    assert np.allclose(spacing, [3.6,3.25,3.25], atol=1e-3)
    with pytest.raises(DSCError, match='no_bolus'): check_dsc(s)


@pytest.mark.real
def test_mosaics_without_their_private_header(tmp_path):
    for i in range(12):
        ds = pydicom.dcmread(DATA/'dcm_qa_ts'/'In'/'1.dcm')
        ds.remove_private_tags()
        ds.SOPInstanceUID += f'.{i}'
        ds.save_as(tmp_path/f'{i}.dcm')
    with pytest.raises(DSCError, match='dcm2niix'): read_dsc(tmp_path)


def test_the_audit_of_a_cohort_reads_its_perfusion(sim, small, tmp_path, capsys):
    from mgmt_fast.cli import mgmt_audit
    from mgmt_fast.phantom import make_phantom
    scans = tmp_path/'scans'
    make_phantom(scans, n=4, seed=1, test=0., slices=6, size=24, n_workers=0, progress=False)
    good,bad,several,_ = sorted((scans/'train').iterdir())
    for folder,series in ((good/'DSC',sim.series), (bad/'DSC',small), (several/'DSC',small), (several/'perf',small)):
        write_dsc(series, folder, patient='ZEBBIE^ANNA')
    assert mgmt_audit(scans, tmp_path/'audit', n_workers=0)==1
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path/'audit'/'dsc.csv', dtype=str)
    assert set(table.patient[table.level=='error'])=={bad.name} and '2 DSC series' in said
    assert f'{several.name} DSC: 2 series: none is taken' in said and 'ZEBBIE' not in said


def test_a_cohort_goes_on_past_what_it_cannot_place(sim, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dsc(sim.series, tmp_path/'a'/'DSC')
    scans = dict(T1wCE='a/T1wCE', T2w=str(tmp_path/'a'/'T2w'), FLAIR=sim.series.frame(0))
    cohort = find_dsc(pd.DataFrame([dict(patient='a', **scans)]))
    assert cohort.DSC.tolist()==[str(tmp_path/'a'/'DSC')]
    added = add_perfusion(cohort[['patient','DSC']], tmp_path/'maps', n_workers=0, progress=False)
    assert added.rCBV.isna().all() and cohort_report(added).problem.str.contains('no T2w, FLAIR or T1').all()
    few = audit_dsc(cohort, progress=False, budget=Budget(voxels=1000))
    assert few.finding.tolist()==['unreadable'] and 'Budget(voxels=...)' in few.what[0]
