"Names that moved to another room are still found where they were, and say where they live now."
from importlib import import_module

import pytest

from mgmt_fast.moves import MOVES

moved = [(room,name) for room,names in MOVES.items() for name in names]


@pytest.mark.parametrize('room,name', moved)
def test_old_import_works_and_warns(room, name):
    to,_,new = MOVES[room][name].partition('.')
    with pytest.warns(DeprecationWarning, match=f'from mgmt_fast.{to} import {new or name}'):
        found = getattr(import_module(f'mgmt_fast.{room}'), name)
    assert found is getattr(import_module(f'mgmt_fast.{to}'), new or name)


@pytest.mark.parametrize('room', MOVES)
def test_other_names_are_missing_as_always(room):
    with pytest.raises(AttributeError, match='no_such_name'): import_module(f'mgmt_fast.{room}').no_such_name
