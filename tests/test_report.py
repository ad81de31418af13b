"The page and its figures, on data that would make a careless one fail."
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mgmt_fast.core import MGMTError, rng_for
from mgmt_fast.metrics import AUC_METHODS, auc_ci
from mgmt_fast.report import (HEAD, plot_calibration, plot_decision, plot_forest, plot_losses, plot_pr,
    plot_reliability, plot_roc, write_report)


@pytest.fixture
def scores():
    "Labels and probabilities of a hundred patients"
    rng = rng_for(0, 'test_report')
    y = np.arange(100)%2
    return y, 1/(1+np.exp(-(y-.5+rng.normal(size=100))))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


@pytest.mark.parametrize('plot', [plot_roc, plot_pr, plot_reliability])
@pytest.mark.parametrize('spoil,says', [(lambda y,p: (y*0, p), 'both classes'), (lambda y,p: (y, p*np.nan), 'finite'),
    (lambda y,p: (y[:5], p[:5]), 'too few'), (lambda y,p: (y, p*0+.5), 'tell patients apart')])
def test_no_figure_of_what_cannot_be_scored(scores, plot, spoil, says):
    with pytest.raises(MGMTError, match=says): plot(*spoil(*scores))


def test_reliability_dots_hold_all_patients(scores):
    "The dots' mean, weighted by their sizes, is the share of methylated patients."
    y,p = scores
    x,share = plot_reliability(y, p, n_bins=4).containers[0].lines[0].get_data()
    assert len(x)==4 and np.mean(share)==pytest.approx(y.mean()) and np.mean(x)==pytest.approx(p.mean())


def test_calibration_curve_of_a_true_model_lies_on_the_diagonal():
    rng = rng_for(1, 'test_report')
    p = rng.uniform(.05, .95, 20000)
    y = (rng.random(20000)<p).astype(int)
    line = plot_calibration(y, {'true': p, 'too sure': p**2/(p**2+(1-p)**2)}).lines
    x,seen = line[0].get_data()
    assert np.abs(x-seen).max()<.03
    x,seen = line[1].get_data()
    assert (seen[x<.3]>x[x<.3]).all() and (seen[x>.7]<x[x>.7]).all()


def test_classes_that_do_not_overlap_have_no_calibration_curve(scores):
    y,_ = scores
    assert np.isnan(plot_calibration(y, {'perfect': .1+.8*y+np.linspace(0,.01,100)}).lines[0].get_ydata()).all()


def test_decision_curve_starts_at_the_prevalence_of_all(scores):
    y,p = scores
    model,everybody,nobody = plot_decision(y, {'model': p}).lines
    assert model.get_ydata()[0]==pytest.approx(everybody.get_ydata()[0], abs=.02) and not nobody.get_ydata().any()


def test_forest_keeps_rows_without_a_number():
    t = pd.DataFrame(dict(level=['a','b'], auc=[.6,np.nan], lo=[.5,np.nan], hi=[.7,np.nan]))
    ax = plot_forest(t)
    assert [o.get_text() for o in ax.get_yticklabels()]==['a','b'] and 'too few' in [o.get_text() for o in ax.texts]


def test_figures_name_the_interval(scores):
    y,p = scores
    assert AUC_METHODS[auc_ci(y,p).name] in plot_roc(y, p, n_boot=20).get_legend().get_title().get_text()
    few = plot_roc(np.arange(100)<4, p, n_boot=20).get_legend().get_title().get_text()
    assert AUC_METHODS['bound'] in few
    figures = dict(auc=[.6,.7,np.nan], lo=[.5,.6,np.nan], hi=[.7,.8,np.nan])
    t = pd.DataFrame(dict(level=['a','b','c'], **figures, interval=['A','B',np.nan]))
    ax = plot_forest(t)
    assert 'A or B' in ax.get_xlabel() and [o.get_text() for o in ax.get_yticklabels()]==['a','b','c']
    assert 'mine' in plot_forest(t, interval='mine').get_xlabel()


def test_losses_have_a_panel_each():
    h = pd.DataFrame(dict(epoch=[0,1], train_loss=[.7,.6], valid_loss=[.7,.8]))
    axs = plot_losses({(a,s): [h,h] for a in 'xy' for s in 'abc'})
    assert axs.shape==(2,3) and [o.get_title() for o in axs.flat]==[f'{a}\n{s}' for a in 'xy' for s in 'abc']


def test_page_is_one_file_that_warns_first(tmp_path, scores):
    fig = plot_roc(*scores).figure
    page = write_report(tmp_path/'page.html', 'A & B', {'x<y': ['text', pd.DataFrame(dict(a=['<b>'])),
        fig]}).read_text(encoding='utf-8')
    assert not plt.fignum_exists(fig.number)
    assert all(o in page for o in (*HEAD, 'A &amp; B', 'x&lt;y', '&lt;b&gt;'))
    assert page.index(HEAD[0])<page.index('<h2>')
    assert not re.search(r'(src|href)="(?!data:)', page) and '<script' not in page
