"""The spectrum analysis against independent oracles, known truths and awkward weights."""

import copy
import itertools
import subprocess
import sys
from importlib import import_module

import numpy as np
import open_clip
import pandas as pd
import powerlaw
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from opentrans_lab.alpha import alphas as alpha
from opentrans_lab.alpha import layers
from opentrans_lab.alpha.alphas import (
    AUTHORS_FROZEN,
    RESHAPES,
    RULES,
    compare_authors,
    fit_alpha,
    layer_alphas,
    mp_edge,
    read_state_dict,
    sensitivity,
)
from opentrans_lab.errors import LabError

esd = import_module("opentrans_lab.alpha.esd")  # its face has the function of that name


@pytest.fixture(scope="module")
def rn50():
    """The full-size visual tower of CLIP RN50 with heavy tails of differing weight planted."""
    torch.manual_seed(0)
    tower = open_clip.create_model("RN50", pretrained=None).visual
    with torch.no_grad():
        for k, module in enumerate(m for m in tower.modules() if isinstance(m, nn.Conv2d)):
            out, inner = module.weight.shape[:2]
            pareto = torch.rand(8) ** (-0.1 - 0.02 * k) * 0.02
            low_rank = torch.randn(out, 8) * pareto @ torch.randn(8, inner)
            module.weight += low_rank[:, :, None, None]
    return tower


@pytest.fixture(scope="module")
def rn50_eigs(rn50):
    found = [x for x in layers(rn50) if not x.name.startswith("attnpool")]
    return dict(zip([x.name for x in found], esd.spectra(found), strict=True))


def mixed_spectra(count: int) -> list[np.ndarray]:
    """Pareto, log-normal, exponential, Wishart, spiked, tied and rounded spectra."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(count):
        n = int(rng.integers(25, 130))
        draw = [
            lambda n: rng.pareto(rng.uniform(0.5, 5), n) + 1,
            lambda n: rng.lognormal(0, rng.uniform(0.3, 3), n),
            lambda n: rng.exponential(1, n),
            lambda n: np.linalg.svd(rng.normal(size=(2 * n, n)), compute_uv=False) ** 2,
            lambda n: np.append(rng.exponential(1, n - 3), [20, 50, 300.0]),
            lambda n: rng.choice(rng.pareto(2, n) + 1, n),
            lambda n: np.round(rng.pareto(2, n) + 1, 1),
        ][k % 7]
        found.append(draw(n) * 10 ** rng.uniform(-4, 4))
    return found


def by_powerlaw(eigs):
    fit = powerlaw.Fit(
        eigs, discrete=False, verbose=0, parameter_ranges={"alpha": [1, None]}
    )
    return fit.power_law.alpha, fit.xmin, fit.D


def by_loop(eigs, low=0.0, high=np.inf):
    """Clauset-Shalizi-Newman by brute force on distinct ascending eigenvalues."""
    best = (np.inf, np.nan, np.nan)
    for i, xmin in enumerate(eigs[:-1]):
        if low <= xmin <= high:
            tail = eigs[i:]
            a = 1 + len(tail) / np.log(tail / xmin).sum()
            d = np.abs(1 - (tail / xmin) ** (1 - a) - np.arange(len(tail)) / len(tail)).max()
            if d < best[0]:
                best = (d, a, xmin)
    return best[1], best[2], best[0]


# ------------------------------------------------------------------------------------ oracles


def test_csn_equals_powerlaw_on_mixed_spectra():
    for k, eigs in enumerate(mixed_spectra(200)):
        a, xmin, d = by_powerlaw(eigs)
        fit = fit_alpha(eigs)
        assert fit.alpha == pytest.approx(a, rel=1e-9), k
        assert fit.xmin == xmin, k
        assert abs(fit.D - d) < 1e-12, k


def test_csn_is_the_exact_minimum_on_every_layer_of_rn50(rn50_eigs):
    candidates = evaluations = 0
    assert len(rn50_eigs) == 55
    for name, eigs in rn50_eigs.items():
        eigs = eigs[eigs > 0]
        fit = fit_alpha(eigs)
        a, xmin, d = by_loop(eigs)
        assert fit.alpha == pytest.approx(a, rel=1e-9), name
        assert fit.xmin == xmin, name
        assert abs(fit.D - d) < 1e-12, name
        candidates += len(eigs) - 1
        evaluations += fit.evaluations
    assert evaluations < candidates / 30  # the pruning prunes


@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "layer3.0.conv3", "layer4.0.conv1"])
def test_csn_equals_powerlaw_on_layers_of_rn50(rn50_eigs, name):
    a, xmin, d = by_powerlaw(rn50_eigs[name])
    fit = fit_alpha(rn50_eigs[name])
    assert (fit.alpha, fit.xmin) == (pytest.approx(a, rel=1e-9), xmin) and abs(fit.D - d) < 1e-12


def test_weightwatcher_default_path_agrees(rn50):
    weightwatcher = pytest.importorskip("weightwatcher", reason="pip install weightwatcher")
    model = nn.Sequential(*(copy.deepcopy(m) for m in (
        rn50.layer1[0].conv2, rn50.layer2[0].conv1, rn50.layer3[0].conv3, rn50.layer2[1].conv2)))
    ours = layer_alphas(model)
    theirs = weightwatcher.WeightWatcher(model=model).analyze()
    for column in ("alpha", "xmin", "D"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-6)


def test_csn_equals_weightwatcher_on_the_same_spectra():
    """All without ties: at ties WeightWatcher and powerlaw differ, and we do as powerlaw."""
    pytest.importorskip("weightwatcher", reason="pip install weightwatcher")
    from weightwatcher.WW_powerlaw import pl_fit

    untied = [x for x in mixed_spectra(200) if len(np.unique(x)) == len(x)]
    assert len(untied) > 140
    for eigs in untied:
        theirs, ours = pl_fit(data=np.sort(eigs)), fit_alpha(eigs)
        np.testing.assert_allclose(
            [ours.alpha, ours.xmin, ours.D], [theirs.alpha, theirs.xmin, theirs.D], rtol=1e-6)


def test_mid_and_peak_rules_equal_a_direct_reading_of_their_definitions(rn50_eigs):
    layers_of_rn50 = [rn50_eigs["layer2.0.conv2"], rn50_eigs["layer3.0.conv1"]]
    for eigs in [np.sort(x) for x in mixed_spectra(70)] + layers_of_rn50:
        eigs = eigs[eigs > 0]
        tail = eigs[eigs >= eigs[len(eigs) // 2]]
        assert fit_alpha(eigs, "mid").alpha == pytest.approx(
            1 + len(tail) / np.log(tail / tail[0]).sum(), rel=1e-9)
        assert fit_alpha(eigs, "mid").n_tail == len(tail)
        if len(np.unique(eigs)) < len(eigs):
            continue  # the loop below reads distinct values
        for rule in ("peak", "peak_official"):
            kept = eigs[eigs > 1e-5] if rule == "peak_official" else eigs
            counts, edges = np.histogram(np.log10(kept), 100)
            mode = 10 ** edges[np.argmax(counts)]
            low = np.log10(0.95 * mode) if rule == "peak_official" else 0.95 * mode
            a, xmin, d = by_loop(kept, low, 1.5 * mode)
            fit = fit_alpha(eigs, rule)
            np.testing.assert_allclose([fit.alpha, fit.xmin, fit.D], [a, xmin, d], rtol=1e-9)


@pytest.mark.parametrize("true", [1.5, 2.0, 3.0, 4.5, 6.0])
def test_known_alpha_is_recovered(true):
    rng = np.random.default_rng(int(10 * true))

    def draw(n):
        return 0.3 * (1 - rng.random(n)) ** (-1 / (true - 1))

    for n in (50, 500, 5000):
        fit = fit_alpha(draw(n), xmin=0.3)
        assert abs(fit.alpha - true) < 3 * (true - 1) / np.sqrt(n)
        assert fit.sigma == pytest.approx((fit.alpha - 1) / np.sqrt(n)) and fit.n_tail == n
    median = np.median([fit_alpha(draw(500)).alpha for _ in range(200)])
    assert median == pytest.approx(true, rel=0.1)


# --------------------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize("shape", [(12, 7), (8, 6, 3), (6, 10, 3, 3), (5, 4, 2, 4), (9, 16, 1, 1)])
def test_eigenvalues_are_squared_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w = weight.double().numpy()
    scale = 0.5 if w.ndim > 2 else 1.0
    taps = w.reshape(*shape[:2], -1)
    slices = [scale * np.linalg.svd(taps[..., k], compute_uv=False) ** 2
              for k in range(taps.shape[-1])]
    flat = np.linalg.svd(w.reshape(shape[0], -1), compute_uv=False) ** 2
    np.testing.assert_allclose(alpha.esd(weight), np.sort(np.concatenate(slices)), rtol=1e-9)
    np.testing.assert_allclose(alpha.esd(weight, "flatten"), np.sort(flat), rtol=1e-9)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (3,)])
def test_fft_is_the_spectrum_of_the_convolution_as_an_operator(kernel, monkeypatch):
    """The matrix of the periodic convolution, column by column, has these singular values."""
    monkeypatch.setattr(esd, "_CHUNK", 40)  # several chunks of frequencies
    weight = torch.randn(3, 2, *kernel, dtype=torch.float64)
    side, axes = esd.FFT_GRID, len(kernel)
    basis = torch.eye(2 * side**axes, dtype=torch.float64).reshape(-1, 2, *[side] * axes)
    pad = [p for k in reversed(kernel) for p in (0, k - 1)]
    conv = nn.functional.conv2d if axes == 2 else nn.functional.conv1d
    matrix = conv(nn.functional.pad(basis, pad, mode="circular"), weight).flatten(1)
    exact = torch.linalg.svdvals(matrix) ** 2
    torch.testing.assert_close(alpha.esd(weight, "fft"), exact.sort().values)


def test_fft_of_a_1x1_kernel_is_its_matrix():
    weight = torch.randn(6, 4, 1, 1)
    torch.testing.assert_close(alpha.esd(weight, "fft"), 2 * alpha.esd(weight, "slices"))


def test_grouped_convolution_is_its_block_diagonal_matrix():
    conv = nn.Conv2d(8, 12, 1, groups=4, bias=False)
    dense = torch.block_diag(*conv.weight.detach()[:, :, 0, 0].chunk(4))
    pooled = alpha.esd(conv.weight, "flatten", groups=4)
    torch.testing.assert_close(
        pooled, (torch.linalg.svdvals(dense.double()) ** 2).sort().values[-len(pooled):])
    assert layer_alphas(nn.Sequential(conv)).n_evals[0] == 8


def test_random_weights_end_at_the_marchenko_pastur_edge():
    weight = 0.05 * torch.randn(200, 100, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.001
    for reshape, slack in (("slices", 0.05), ("flatten", 0.05), ("fft", 0.08)):
        assert alpha.esd(weight, reshape).max().item() == pytest.approx(
            mp_edge(weight, reshape), rel=slack)


def test_controls_keep_what_they_promise():
    weight = torch.randn(32, 16, 3, 3) ** 3
    shuffled = alpha.randomise(weight, "permute", 0, "a")
    assert torch.equal(shuffled.flatten().sort().values, weight.flatten().sort().values)
    assert not torch.equal(shuffled, weight)
    noise = alpha.randomise(weight, "gaussian", 0, "a")
    assert noise.std() == pytest.approx(weight.std().item(), rel=0.05)
    assert torch.equal(noise, alpha.randomise(weight, "gaussian", 0, "a"))
    assert not torch.equal(noise, alpha.randomise(weight, "gaussian", 1, "a"))
    assert not torch.equal(noise, alpha.randomise(weight, "gaussian", 0, "b"))


# ------------------------------------------------------------------------------------- hazards


def test_awkward_layers_are_nan_with_a_reason_and_the_rest_goes_on():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(
        good=nn.Conv2d(32, 32, 3), orthogonal=nn.Linear(60, 60), scaled=nn.Linear(60, 60),
        sparse=nn.Linear(40, 40), zero=nn.Linear(40, 40), constant=nn.Conv2d(16, 16, 3),
        nan=nn.Linear(40, 40), inf=nn.Linear(40, 40), depthwise=nn.Conv2d(32, 32, 3, groups=32),
        table=nn.Embedding(50, 20), transposed=nn.ConvTranspose2d(8, 8, 2), tiny=nn.Linear(2, 2),
    ))
    with torch.no_grad():
        for name, factor in dict(orthogonal=1, scaled=1e3).items():
            nn.init.orthogonal_(model[name].weight).mul_(factor)
        model["scaled"].double()
        model["sparse"].weight = nn.Parameter(model["sparse"].weight.to_sparse())
        model["zero"].weight.zero_()
        model["constant"].weight.fill_(0.1)
        model["nan"].weight[3, 4] = torch.nan
        model["inf"].weight[3, 4] = torch.inf
    table = layer_alphas(model, control="permute", bootstrap=3).set_index("name")
    assert list(table.index) == list(model)
    for reshape, rule in itertools.product(RESHAPES, RULES):
        other = layer_alphas(model, reshape, rule).set_index("name")
        fitted = {"good"} | ({"constant"} if reshape == "fft" else set())  # a blur, as an operator
        assert set(other.index[other.alpha.notna()]) == fitted, (reshape, rule)
        assert other.alpha["good"] > 1 and (other.status != "").all()
    assert table.alpha["good"] > 1 and table.status["good"] == "ok"
    failed = table.drop("good")
    for column in ("alpha", "sigma", "xmin", "D", "freeze_probability"):
        assert failed[column].isna().all()
    for name, word in dict(zero="zero", sparse="sparse", orthogonal="equal", scaled="equal",
                           nan="NaN", inf="Inf", tiny="distinct", depthwise="depthwise",
                           table="Embedding", transposed="ConvTranspose2d").items():
        assert word in table.status[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_values_equal_up_to_rounding_make_no_tail(rule, dtype):
    """An orthogonal matrix has one eigenvalue; what rounding adds to it is no power law."""
    torch.manual_seed(0)
    weight = 1e3 * nn.init.orthogonal_(torch.empty(60, 60, dtype=dtype))
    fit = fit_alpha(alpha.esd(weight), rule)
    assert np.isnan(fit.alpha) and "equal up to rounding" in fit.status
    weight[:4] *= torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=dtype)[:, None]
    fit = fit_alpha(alpha.esd(weight), rule)  # the tail above the four is still one value
    assert np.isnan(fit.alpha) or fit.alpha < 20


def test_mid_counts_all_values_from_xmin_up():
    fit = fit_alpha([1, 1, 2, 2, 2, 2, 2, 3, 5, 9], "mid")
    assert fit.n_tail == 8 and fit.alpha == pytest.approx(1 + 8 / np.log([1.5, 2.5, 4.5]).sum())


@pytest.mark.parametrize("rule", RULES)
def test_tied_and_tiny_spectra(rule):
    rng = np.random.default_rng(0)
    tied = np.repeat(rng.pareto(2, 40) + 1, 3)
    assert 1 < fit_alpha(tied, rule).alpha < 10
    assert np.isnan(fit_alpha(np.ones(50), rule).alpha)
    assert np.isnan(fit_alpha([], rule).alpha)
    tiny = fit_alpha(rng.pareto(2, 12) + 1, rule)
    assert "small tail" in tiny.status or np.isnan(tiny.alpha)


def test_rank_deficiency_leaves_exact_zeros_and_the_same_tail():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(120, 40, generator=generator) @ torch.randn(40, 90, generator=generator)
    eigs = alpha.esd(low.double())
    assert (eigs == 0).sum() == 50 and eigs[50] > 1e-3
    assert fit_alpha(eigs, "mid").n_tail == 20


def test_what_is_null_in_the_whole_layer_is_null():
    """A 2 x 2 box kernel passes nothing at the highest frequencies, whatever rounding says."""
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigs = alpha.esd(mix[:, :, None, None].expand(24, 24, 2, 2), "fft")
    assert eigs[eigs > 0].min() > 1e-12 * eigs.max()
    assert (eigs == 0).sum() == 24 * 15  # one row and one column of the 8 x 8 frequencies


@pytest.mark.parametrize(("weight", "groups", "said"), [
    (torch.randn(0, 5), 1, "empty"), (torch.eye(6).to_sparse(), 1, "sparse"),
    (torch.eye(6).to_sparse_csr(), 1, "sparse"), (torch.empty(6, 6, device="meta"), 1, "meta"),
    (torch.eye(6, dtype=torch.int64), 1, "int64"), (torch.eye(6).cfloat(), 1, "complex64"),
    (torch.randn(6, 6), 4, "groups=4"), (torch.randn(6, 6), 0, "groups=0"),
    (torch.randn(6), 1, "no matrix"), (torch.full((3, 3), torch.nan), 1, "NaN"),
])
def test_weights_without_a_spectrum_are_refused_with_a_sentence(weight, groups, said):
    with pytest.raises(LabError, match=said):
        alpha.esd(weight, groups=groups)


def test_a_failing_solver_and_vanishing_squares_cost_one_layer(monkeypatch):
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(30, 30), "b.weight": torch.randn(40, 40),
             "c.weight": torch.randn(30, 30, dtype=torch.float64) * 1e-170, 7: torch.ones(3, 3)}
    real = torch.linalg.eigvalsh

    def solver(gram):
        if gram.shape[-1] == 40:
            raise RuntimeError("can't allocate memory\nmore")
        return real(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", solver)
    table = layer_alphas(state).set_index("name")
    assert table.alpha["a"] > 1 and table.alpha[["b", "c"]].isna().all()
    assert table.status["b"] == "no eigenvalues: can't allocate memory"
    assert "too small" in table.status["c"] and "bare" in table.status["7"]
    monkeypatch.undo()
    assert layer_alphas(state).alpha[1] > 1  # a failure is not remembered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    linear = nn.Linear(64, 64)
    exact = alpha.esd(linear.weight.to(dtype).double())
    torch.testing.assert_close(alpha.esd(linear.weight.to(dtype)), exact)
    assert layer_alphas(linear.to(dtype)).alpha.notna().all()


def test_pruned_weights_are_read_as_they_act():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 48, 3), nn.Linear(64, 64), nn.MultiheadAttention(32, 2))
    bare = copy.deepcopy(model)
    for module in model[:2]:
        prune.random_unstructured(module, "weight", 0.9)
    prune.random_unstructured(model[2], "in_proj_weight", 0.5)
    with torch.no_grad():
        for name in ("0.weight", "1.weight", "2.in_proj_weight"):
            kept = model.get_buffer(f"{name}_mask") * model.get_parameter(f"{name}_orig")
            bare.get_parameter(name).copy_(kept)
            model.get_parameter(f"{name}_orig").add_(1 - model.get_buffer(f"{name}_mask"))
    expected = layer_alphas(bare)
    for source in (model, model.state_dict()):
        pd.testing.assert_frame_equal(layer_alphas(source).drop(columns="type"),
                                      expected.drop(columns="type"))
    assert list(expected.name) == ["0", "1", "2.in_proj.q", "2.in_proj.k", "2.in_proj.v",
                                   "2.out_proj"]


@pytest.mark.parametrize("wrap", [
    nn.utils.spectral_norm, nn.utils.weight_norm, parametrizations.spectral_norm,
    parametrizations.weight_norm])
@pytest.mark.parametrize("layer", [nn.Linear(50, 40), nn.Conv2d(30, 40, 3)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_weights_are_read_as_they_act_and_nothing_changes(wrap, layer):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(copy.deepcopy(layer)), nn.Linear(40, 30))
    with torch.no_grad():  # as after loading a checkpoint: what the module caches is out of date
        next(p for p in model.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1).mul_(
            torch.rand(layer.weight.shape[1]).view(1, -1, *[1] * (layer.weight.ndim - 2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = layer_alphas(model)
    assert model[0].training and model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    x = torch.randn(2, layer.weight.shape[1], *[5] * (layer.weight.ndim - 2))
    model.eval()(x) if layer.weight.ndim == 2 else model[0].eval()(x)
    acting = layer_alphas({"0.weight": model[0].weight, "1.weight": model[1].weight})
    assert list(table.name) == ["0", "1"]
    np.testing.assert_allclose(table.alpha, acting.alpha)
    np.testing.assert_allclose(table.log_norm, acting.log_norm)


def test_spectral_norm_in_a_bare_state_dict_is_refused():
    model = nn.utils.spectral_norm(nn.Linear(50, 40))
    table = layer_alphas(model.state_dict())
    assert table.alpha.isna().all() and "parametrised" in table.status[0]


def test_parametrised_weights_are_computed_from_the_model_and_refused_from_a_state_dict():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(50, 40)))
    ours = layer_alphas(model)
    assert len(ours) == 1 and ours.alpha[0] == layer_alphas({"0.weight": model[0].weight}).alpha[0]
    table = layer_alphas(model.state_dict())
    assert table.alpha.isna().all() and "parametrised" in table.status[0]


@pytest.mark.parametrize("reshape", ["slices", "flatten"])
@pytest.mark.parametrize("rule", ["csn", "mid", "peak"])
def test_the_frozen_half_does_not_depend_on_the_scale_of_the_weights(rn50, rule, reshape):
    state = {k: v for k, v in rn50.state_dict().items() if k.startswith("layer2") and v.ndim == 4}
    a = layer_alphas(state, reshape, rule)
    b = layer_alphas({k: 10 * v for k, v in state.items()}, reshape, rule)
    np.testing.assert_array_equal(a.alpha < a.alpha.median(), b.alpha < b.alpha.median())


# ------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "ViT-B-16", "convnext_base"])
def test_every_layer_of_open_clip_models_is_accounted_for(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, pretrained=None, device="meta")
    names = {x.name: x for x in layers(model)}
    weights = [k for k, p in model.named_parameters() if p.ndim > 1]
    covered = {k.removesuffix(".weight") for k in weights if not k.endswith("in_proj_weight")}
    fused = [k.removesuffix("_weight") for k in weights if k.endswith("in_proj_weight")]
    assert set(names) == covered | {f"{k}.{part}" for k in fused for part in "qkv"}
    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            depthwise = getattr(module, "groups", 1) > 1
            assert ("depthwise" in names[key].reason) == depthwise
            assert depthwise or "meta" in names[key].reason
    bare = [x for x in names.values() if x.type not in ("conv2d", "linear", "attention")]
    assert len(bare) < 6 and all("not a layer" in x.reason or "only" in x.reason for x in bare)


def kinds(source):
    """What `layers` makes of a model: name -> (type, analysed)."""
    return {x.name: (x.type, x.reason == "" or "no values" in x.reason) for x in layers(source)}


def test_a_module_and_its_state_dict_give_the_same_layers():
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16-SigLIP", pretrained=None, device="meta")
    built, bare = kinds(model), kinds(model.state_dict())
    assert {k for k, v in built.items() if v[1]} == {k for k, v in bare.items() if v[1]}
    assert all(bare[k][0] == v[0] for k, v in built.items() if v[1])
    assert built["visual.trunk.patch_embed.proj"] == ("conv2d", True)
    assert built["visual.trunk.blocks.3.attn.qkv.k"] == ("attention", True)
    assert not built["text.token_embedding"][1]


def test_names_with_embed_in_them():
    state = {"patch_embedding.weight": torch.randn(30, 3, 4, 4), "wte.weight": torch.randn(40, 30),
             "time_embed.0.weight": torch.randn(40, 30), "embeddings.word.weight": torch.eye(30),
             "x.position_embedding.weight": torch.randn(40, 30)}
    found = {name for name, (_, analysed) in kinds(state).items() if analysed}
    assert found == {"patch_embedding", "time_embed.0", "embeddings.word"}


def test_one_input_channel_is_depthwise_only_in_groups():
    model = nn.ModuleDict(dict(grey=nn.Conv2d(1, 64, 7), deep=nn.Conv2d(16, 16, 3, groups=16)))
    flat = layer_alphas(model, "flatten").set_index("name")
    assert flat.alpha["grey"] > 1 and flat.n_evals["grey"] == 49
    assert "depthwise" in flat.status["deep"]
    bare = layer_alphas(model.state_dict())
    assert bare.alpha.isna().all() and bare.status.str.contains("or a single-channel input").all()


def test_fused_qkv_is_three_layers():
    torch.manual_seed(0)
    fused = nn.ModuleDict({"qkv": nn.Linear(40, 120), "attn": nn.ModuleDict(
        {"qkv": nn.Linear(40, 120)})})
    table = layer_alphas(fused).set_index("name")
    assert list(table.index) == [f"{k}.{x}" for k in ("qkv", "attn.qkv") for x in "qkv"]
    alone = layer_alphas({"k.weight": fused["attn"]["qkv"].weight[40:80]})
    assert table.alpha["attn.qkv.k"] == alone.alpha[0]
    transposed = {"c_attn.weight": torch.randn(40, 120), "qkv.weight": torch.randn(40, 120)}
    assert len(layers(transposed)) == 2


def test_freeze_probability_counts_fitted_replicates_only(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
    real, calls = alpha.fit_alpha, []

    def flaky(eigs, rule):  # every second replicate of the first layer is lost
        calls.append(1)
        steep = real(eigs, rule)
        first = len(calls) in range(5, 25)
        if first and len(calls) % 2:
            return alpha.Fit(status="lost")
        return alpha.Fit(alpha=1.1) if first else steep

    monkeypatch.setattr(alpha, "fit_alpha", flaky)
    table = layer_alphas(model, bootstrap=20)
    assert table.freeze_probability[0] == 1  # below in each replicate that has an alpha
    assert table.freeze_probability.between(0, 1).all()


@pytest.mark.parametrize("options", [dict(bootstrap=-1), dict(bootstrap=2.5), dict(seed=-1)])
def test_odd_numbers_are_refused(options):
    with pytest.raises(LabError, match="must be"):
        layer_alphas(nn.Linear(30, 30), **options)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16"])
def test_every_layer_of_a_full_size_tower_is_fitted(name):
    torch.manual_seed(0)
    tower = open_clip.create_model(name, pretrained=None).visual
    table = layer_alphas(tower)
    told = table.status.str.contains("bare parameter|small tail") | (table.status == "ok")
    assert told.all() and (table.alpha > 1).sum() == table.alpha.notna().sum() >= 50
    assert table.alpha.isna().eq(table.status.str.contains("bare")).all()


def test_table_columns_controls_and_bootstrap():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(24, 24, 3) for _ in range(5)))
    with torch.no_grad():  # one layer with a heavy tail
        model[2].weight[:, :, 1, 1] += torch.randn(24, 1) @ torch.randn(1, 24)
        model[2].weight.mul_(torch.rand(24, 1, 1, 1) ** -1.5)
    table = layer_alphas(model, control="permute", bootstrap=20, seed=1)
    assert list(table.columns) == (
        "name type shape params n_evals alpha sigma xmin D n_tail stable_rank log_norm "
        "control_alpha freeze_probability status reshape rule").split()
    assert table.alpha.idxmin() == 2 and table.freeze_probability[2] > 0.9
    assert table.control_alpha[2] > table.alpha[2]
    assert table.freeze_probability.between(0, 1).all()
    pd.testing.assert_frame_equal(
        table, layer_alphas(model, control="permute", bootstrap=20, seed=1))
    eigs = alpha.esd(model[0].weight)
    assert table.stable_rank[0] == pytest.approx((eigs.sum() / eigs.max()).item())
    assert table["shape"][0] == "24x24x3x3" and table.params[0] == 24 * 24 * 9


def test_cache_knows_content_not_identity(monkeypatch):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    before = layer_alphas(model)
    calls = []
    monkeypatch.setattr(esd, "esd", lambda *a: calls.append(a) or alpha.esd(*a))
    layer_alphas(copy.deepcopy(model), rule="mid")
    assert not calls  # another rule, another object: nothing is decomposed again
    model[1].weight.data[0, 0] += 1
    after = layer_alphas(model)
    assert len(calls) == 1 and before.alpha[0] == after.alpha[0] != after.alpha[1]


def test_state_dict_files_need_no_model(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Linear(32, 24))
    expected = layer_alphas(model)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    nested = {f"module.visual.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": nested}, tmp_path / "b.pt")
    flat = read_state_dict(tmp_path / "a.safetensors")
    pd.testing.assert_frame_equal(layer_alphas(flat), expected)
    opened = read_state_dict(tmp_path / "b.pt", prefix="visual.")
    pd.testing.assert_frame_equal(layer_alphas(opened), expected)
    weights = model.state_dict()
    state = {i: {"exp_avg": torch.ones(9, 9), "exp_avg_sq": torch.ones(9, 9)} for i in range(50)}
    for k, beside in enumerate((
        {"model": weights, "step": torch.tensor(5)}, {"loss": torch.zeros(1), "net": weights},
        {"optimizer": {"state": state, **{str(i): i for i in range(50)}}, "model": weights},
        {"optimizer": {"state": state}, "teacher": {"weight": torch.eye(3)}, "model": weights},
    )):
        torch.save(beside, tmp_path / f"n{k}.pt")
        opened = read_state_dict(tmp_path / f"n{k}.pt")
        pd.testing.assert_frame_equal(layer_alphas(opened), expected)
    (tmp_path / "bad.pt").write_bytes(b"no")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    said = {"no.pt": "does not exist", "bad.pt": "damaged", "empty.pt": "holds no"}
    for name, word in said.items():
        with pytest.raises(LabError, match=word):
            read_state_dict(tmp_path / name)
    with pytest.raises(LabError, match="'text.'"):
        read_state_dict(tmp_path / "b.pt", "text.")


@pytest.mark.parametrize("option", ["reshape", "rule", "control"])
def test_unknown_options_list_the_valid_ones(option):
    with pytest.raises(LabError, match="use one of"):
        layer_alphas(nn.Linear(30, 30), **{option: "best"})


def test_sensitivity_is_zero_on_the_diagonal_and_symmetric():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(24, 24 + 4 * k, 3) for k in range(6)))
    table = sensitivity(model)
    assert len(table) == 144
    same = table[table.a == table.b]
    assert (same.spearman > 0.999).all() and (same.layers == 0).all() and (same.params == 0).all()
    square = table.pivot(index="a", columns="b", values="layers")
    np.testing.assert_array_equal(square, square.T)
    assert table.layers.max() > 0


def test_authors_comparison_on_made_up_alphas(rn50):
    names = [x.name for x in layers(rn50) if x.type == "conv2d"]
    assert len(names) == 55 and set(AUTHORS_FROZEN) < set(names) and len(AUTHORS_FROZEN) == 27
    rng = np.random.default_rng(0)
    low = np.array([name in AUTHORS_FROZEN for name in names])
    table = pd.DataFrame(dict(name=[f"visual.{n}" for n in names], type="conv2d",
                              alpha=np.where(low, 2, 4) + rng.random(55)))
    assert compare_authors(table).shared == 27
    assert compare_authors(table).p_value < 1e-12
    opposite = compare_authors(table.assign(alpha=10 - table.alpha))
    assert opposite.shared == 0 and opposite.p_value == 1
    swapped = table.copy()
    a, b = np.flatnonzero(low)[0], np.flatnonzero(~low)[0]
    swapped.loc[[a, b], "alpha"] = swapped.loc[[b, a], "alpha"].to_numpy()
    assert compare_authors(swapped).shared == 26 and "26 of the authors' 27" in str(
        compare_authors(swapped))
    with pytest.raises(LabError, match="conv1"):
        compare_authors(table[table.name != "visual.conv1"])


def test_alpha_stands_on_torch_numpy_and_pandas_alone():
    code = ("import sys, opentrans_lab.alpha.alphas; "
            "print([m for m in ('open_clip', 'torchvision', 'matplotlib', 'transformers', 'scipy') "
            "if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ------------------------------------------------------------------------------------ pictures


def test_pictures_of_spectra_and_gaps():
    import matplotlib

    matplotlib.use("agg")
    from opentrans_lab.figures import plots

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    table = layer_alphas(model, control="permute")
    blank = table.assign(alpha=table.alpha[::-1].to_numpy(), control_alpha=1.5)
    blank.loc[2, "alpha"] = 500.0
    (axis,) = plots.control_gap(table, blank[::-1], "told").axes
    assert axis.get_title() == "told"
    assert [bar.get_height() for bar in axis.patches] == list(table.alpha - table.control_alpha)
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), blank.alpha - blank.control_alpha)
    assert axis.get_ylim()[1] > 498.5  # the circles are in the picture
    with pytest.raises(LabError, match="none of these layers"):
        plots.esd_grid({}, table)


def test_explorer_is_a_static_panel_headless_and_widgets_in_a_session(monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from opentrans_lab.figures.explorer import compare, explore

    torch.manual_seed(0)
    models = {"a": nn.Sequential(nn.Conv2d(24, 24, 3), nn.Linear(30, 40)), "b": nn.Linear(30, 30)}
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    figure = explore(models)
    assert [axis.get_title() for axis in figure.axes] == [f"slices + {rule}" for rule in RULES]
    assert "α = " in figure.axes[0].texts[0].get_text()
    with pytest.raises(LabError, match="no layer 'x'"):
        compare(models["a"], "x")
    hollow = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30))
    with torch.no_grad():
        hollow[1].weight.zero_()
    assert explore({"hollow": hollow}).get_suptitle() == "2"
    for nothing in ({}, {"norm": nn.BatchNorm2d(3)}, {"zero": hollow[1]}):
        with pytest.raises(LabError, match="nothing to explore"):
            explore(nothing)
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *objects: shown.extend(objects))
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/01.ipynb")
    assert explore(models) is None
    (model, reshape, rule), layer = shown[-1].children[0].children, shown[-1].children[1]
    reshape.value, rule.value = "fft", "mid"
    model.value = "b"  # another model offers its own layers
    assert layer.options == ("weight",)
    drawn = shown[-1]
    assert drawn.get_suptitle() == "weight" and drawn.axes[0].get_title() == "fft + mid"
