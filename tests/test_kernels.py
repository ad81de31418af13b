"The Kaggle kernels run to their end offline, on a phantom, and their metadata is what Kaggle accepts."
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

KERNELS = sorted((Path(__file__).parent.parent/'kaggle').glob('*/kernel-metadata.json'))


@pytest.mark.parametrize('meta', KERNELS, ids=lambda p: p.parent.name)
def test_metadata(meta):
    d = json.loads(meta.read_text())
    user,slug = d['id'].split('/')
    assert slug==re.sub(r'[^a-z0-9]+', '-', d['title'].lower()).strip('-') and 5<=len(d['title'])<=50
    assert (meta.parent/d['code_file']).exists() and d['kernel_type']=='notebook' and d['language']=='python'
    assert d['enable_internet'] is False and d['is_private'] is True
    assert 'rsna-miccai-brain-tumor-radiogenomic-classification' in d['competition_sources']


@pytest.mark.parametrize('meta', KERNELS, ids=lambda p: p.parent.name)
def test_runs_offline_on_a_phantom(meta, tmp_path):
    nb = nbformat.read(meta.parent/json.loads(meta.read_text())['code_file'], as_version=4)
    NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    if (tmp_path/'working/submission.csv').exists():
        sub = pd.read_csv(tmp_path/'working/submission.csv', dtype={'BraTS21ID':str})
        want = pd.read_csv(tmp_path/'working/phantom/sample_submission.csv', dtype={'BraTS21ID':str})
        assert list(sub.columns)==list(want.columns) and sub.BraTS21ID.tolist()==want.BraTS21ID.tolist()
        assert sub.MGMT_value.between(0,1).all()
