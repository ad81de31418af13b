"Marks and fixtures that all tests share."
import os
from pathlib import Path

import pytest

DATA = os.environ.get('MGMT_FAST_DATA')


def pytest_configure(config):
    for mark,why in dict(real='needs the real scans that MGMT_FAST_DATA points to', slow='takes minutes', cuda='needs a GPU').items():
        config.addinivalue_line('markers', f'{mark}: {why}')


def pytest_collection_modifyitems(items):
    import torch
    for item in items:
        if 'real' in item.keywords and not DATA: item.add_marker(pytest.mark.skip(reason='real scans: set MGMT_FAST_DATA to their folder'))
        if 'cuda' in item.keywords and not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='no GPU here'))
        if 'slow' in item.keywords and not os.environ.get('MGMT_FAST_SLOW'): item.add_marker(pytest.mark.skip(reason='slow: set MGMT_FAST_SLOW=1 to run'))


@pytest.fixture
def data():
    "The folder of real scans."
    return Path(DATA)
