"The numbers of `benchmarks/house.py`, on a package small enough to count by hand."
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'))
from house import house

ROOM = '''from .other import _hidden, shown
_a,b = 1,2

def public(x):
    "Left out"
    return x

class _Private:
    def method(self):
        return 1
'''


@pytest.fixture
def package(tmp_path):
    (tmp_path/'room.py').write_text(ROOM)
    (tmp_path/'other.py').write_text('# '+'-'*130+'\n_hidden = shown = None\n')
    return tmp_path


def test_counts(package):
    t = house(package)
    r = t.loc['room']
    assert (r.functions, r.public, r.private, r.borrowed)==(2,2,2,1)
    assert r.lines==2.5 and r['>120 %']==0
    assert r.nodes==2.5, 'return of a name: Return, Name, Load; of a number: Return, Constant'


def test_widths_and_total(package):
    t = house(package)
    assert t.loc['other','>120 %']==50 and t.loc['other','>140 %']==0
    assert t.loc['total','functions']==2 and t.loc['total','public']==3 and t.loc['total','borrowed']==1


def test_our_own_package():
    t = house(root/'mgmt_fast')
    assert set(t.index)-{'total'}=={p.stem for p in (root/'mgmt_fast').glob('*.py')}-{'_modidx'}
    for c in ('functions','public','private','borrowed'): assert t.loc['total',c]==t.drop('total')[c].sum()
