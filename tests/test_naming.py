"Names and headers of series: real descriptions, and the laws that every name keeps."
import csv
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from mgmt_fast.core import SEQUENCES
from mgmt_fast.naming import name_series, sequence_of

TIMES = dict(FLAIR=dict(RepetitionTime=9000, EchoTime=120, InversionTime=2500),
    T1w=dict(RepetitionTime=500, EchoTime=10),
    T1wCE=dict(RepetitionTime=500, EchoTime=10, ContrastBolusAgent='Gadovist'),
    T2w=dict(RepetitionTime=4000, EchoTime=95, InversionTime=10))
table = list(csv.DictReader(open(Path(__file__).parent/'descriptions.csv', encoding='utf-8')))


def test_the_table_is_what_it_should_be():
    assert len(table)>=300 and {o['sequence'] for o in table}=={*SEQUENCES,''} and all(o['source'] for o in table)
    assert len({o['description'].lower() for o in table})==len(table)
    assert .3<sum(o['part']=='held back' for o in table)/len(table)<.4


@pytest.mark.parametrize('part', ['','held back'])
def test_real_descriptions(part):
    "No wrong name; at most a tenth of those that are one of the four stays unnamed"
    rows = [(o['description'],o['sequence'],sequence_of(o['description']) or '') for o in table if o['part']==part]
    assert not [o for o in rows if o[2] not in ('',o[1])]
    named = [o for o in rows if o[1]]
    assert sum(not o[2] for o in named)<=.1*len(named)


@pytest.mark.parametrize('seq', SEQUENCES)
def test_name_and_header(seq):
    "With the header of its own sequence a name keeps it; with another's it never becomes a third one"
    for o in table:
        if o['sequence']!=seq or not sequence_of(o['description']): continue
        v = name_series(o['description'], header=TIMES[seq])
        assert v[:2]==(seq,'both'), (o, v)
        for other in SEQUENCES:
            v = name_series(o['description'], header=TIMES[other])
            assert v.sequence in (None,seq) or seq=='T1w' and (other,v.sequence)==('T1wCE','T1wCE'), (o, other, v)


@pytest.mark.parametrize('header', [dict(Modality='CT'), dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.2'),
    dict(ImageType='ORIGINAL\\PRIMARY\\P\\ND'),
    dict(ImageType=['DERIVED','SECONDARY','MPR']),
    dict(ImageType='DERIVED\\PRIMARY\\DIFFUSION\\ADC'), dict(ScanningSequence='EP'),
    dict(ScanningSequence="['SE', 'EP']"),
    dict(ScanningSequence='GR', EchoTime=20, RepetitionTime=600),
    dict(ScanningSequence=['SE','IR'], InversionTime=150, EchoTime=60)])
def test_a_header_that_says_something_else(header):
    for name in ('FLAIR','AX T1','AX T1 C+','T2w',''): assert name_series(name, header=header).sequence is None


@pytest.mark.parametrize('agent', ['','NONE','no','0',None])
def test_no_agent_is_no_agent(agent):
    assert name_series('AX T1', header={**TIMES['T1w'], 'ContrastBolusAgent':agent})[:2]==('T1w','both')
    assert name_series('AX T1 C+', header={**TIMES['T1w'], 'ContrastBolusAgent':agent}).sequence=='T1wCE'


@pytest.mark.parametrize('name,seq', [('T1 nativ','T1w'), ('T1 ohne KM','T1w'), ('T1 nach KM','T1wCE'),
    ('t1_se_tra_km','T1wCE'), ('T1 avec injection','T1wCE'),
    ('T1 sans injection','T1w'), ('T1 S/C','T1w'), ('T1 C/C','T1wCE'), ('T1 con Gd','T1wCE'), ('T1 sin Gd','T1w'),
    ('T1 w/ contrast','T1wCE'),
    ('T1 w/o contrast','T1w'), ('T1 noncontrast','T1w'), ('T1 Non-Contrast','T1w'), ('T1 unenhanced','T1w'),
    ('T1 5 cm','T1w'), ('T1_ipat2','T1w'),
    ('T1 조영','T1wCE'), ('T1 增强','T1wCE'), ('t2_spc_da-fl_sag','FLAIR'), ('t2_tirm_tra','FLAIR'),
    ('T1 pre-op post Gd','T1wCE'), ('T1 post op','T1w'),
    ('t1_tirm_tra_dark-fluid','T1w'), ('MP2RAGE_UNI','T1w'), ('MP2RAGE_INV1',None),
    ('t1_mpr_ns_sag_p2_iso_MPR_Tra',None), ('T1 pre and post contrast',None),
    ('AX T2 STAR GRE',None), ('T2W_FFE_AX',None), ('trace',None), ('ep2d_perf',None), ('TOF T1',None),
    ('AX SWI T2',None), ('T1 Subtraktion',None), ('T1 s/gad','T1w'), ('T1 con CIV','T1wCE'), ('T1 Gd-','T1w'),
    ('T1 -C',None),
    ('t1_mp2rage_sag_T1_Images',None), ('t1_mp2rage_sag_UNI_Images','T1w'), ('AX T1 FLAIR +C','T1wCE')])
def test_spellings(name, seq): assert sequence_of(name)==seq


@pytest.mark.parametrize('name', ['T1 w/out contrast', 'T1 w.o. contrast', 'T1 w-o contrast', 'T1 without any contrast',
    'T1 without intravenous contrast', 'T1 without i.v. contrast', 'T1 without use of contrast', 'T1 prior to contrast',
    'T1 minus contrast', 'T1 zonder contrast', 'T1 contrast: no', 'contrast none T1', 'T1 GAD NO', 'T1 Gd free',
    'contrast-free T1', 'T1 no iv', 'T1 gad-'])
def test_no_contrast_in_other_words(name): assert sequence_of(name)=='T1w'


@pytest.mark.parametrize('name', ['T1CE-T1', 'T1-T1CE', 'T2 MERGE', 't2_me2d', 'T2 b0', 'T2 relaxometry', 'delta T1',
    'synthetic T1', 'T1 opposed', 'T1 -contrast'])
def test_what_is_no_plain_sequence(name): assert sequence_of(name) is None


@pytest.mark.parametrize('name', ['T1 pos contraste', 'post-contrast no fs T1', 'T1 contrast free breathing',
    'T1-contrast'])
def test_contrast_stays_contrast(name): assert sequence_of(name)=='T1wCE'


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.dictionaries(st.sampled_from(['Modality','ImageType','ContrastBolusAgent',
    'ScanningSequence']), st.text(max_size=12)))
def test_any_text_is_answered(name, header):
    v = name_series(name, header=header)
    assert (v.sequence is None)==(v.evidence is None) and (v.sequence in SEQUENCES or v.why)
