"""``ddpmctl evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.checks import check_choices, check_counts, check_ema_length, check_guidance
from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Devices, Quiet, choices, complete, reading, switch, tell_model, weights_text
from ddpmctl.cli.together import devices_of, joined, spread_over
from ddpmctl.parsing import parse_count, parse_device, parse_size, shown

_FEWEST, _MOST = 5, 200_000

_HOW, _SHEET = "How", "Memorisation"


def evaluate(
    what: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint or run folder; or a second folder or .zip of images.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder or .zip of real images, tar shards, torchvision:NAME or hf:NAME.")],
    n: Annotated[int, typer.Option("-n", metavar="COUNT", help="How many samples, and at most how many images of DATA.", parser=reading(parse_count))] = 2048,
    features: Annotated[str, typer.Option(metavar=choices("evaluation.features", "FEATURES"), help="The network whose features are compared. efficientnet-lite0 comes with the extra, and is not comparable with published FID; inception is. ...-logits: the scores that it gives to classes, another scale.", autocompletion=complete("evaluation.features", "FEATURES"))] = "efficientnet-lite0",
    feature_weights: Annotated[Path | None, typer.Option(metavar="PATH", help="The file of that network's weights.  [default: its package's, or torch's folder of downloads]")] = None,
    as_json: Annotated[bool, switch("--json", "Print one JSON object.")] = False,
    quality: Annotated[str | None, typer.Option(metavar=choices("plans", "QUALITIES"), help="Sampler, steps and spacing in one word.  [default: balanced]", autocompletion=complete("plans", "QUALITIES"), rich_help_panel=_HOW)] = None,
    sampler: Annotated[str | None, typer.Option(metavar=choices("core.samplers", "SAMPLERS"), help="As in `sample`.  [default: of the quality]", autocompletion=complete("core.samplers", "SAMPLERS"), rich_help_panel=_HOW)] = None,
    steps: Annotated[int | None, typer.Option(metavar="COUNT", help="Denoising steps, 1 to T.  [default: of the quality or sampler]", parser=reading(parse_count), rich_help_panel=_HOW)] = None,
    spacing: Annotated[str | None, typer.Option(metavar=choices("core.spacing", "SPACINGS"), help="Which levels of noise the steps stop at.  [default: of the quality or sampler]", autocompletion=complete("core.spacing", "SPACINGS"), rich_help_panel=_HOW)] = None,
    class_name: Annotated[str | None, typer.Option("--class", metavar="NAME|all", help="Class to draw, and to compare with.  [default: all]", rich_help_panel=_HOW)] = None,
    guidance: Annotated[float, typer.Option(metavar="W", help="As in `sample`; loss and bits are without it.", rich_help_panel=_HOW)] = 1.0,
    seed: Annotated[int, typer.Option(metavar="COUNT", help="Of the samples, of the choice from DATA and of KID's subsets.", parser=reading(parse_count), rich_help_panel=_HOW)] = 0,
    weights: Annotated[str, typer.Option(metavar="ema|raw", help="Averaged or last weights.", rich_help_panel=_HOW)] = "ema",
    ema_length: Annotated[float | None, typer.Option(metavar="0.01..0.28", help="As in `sample`.", rich_help_panel=_HOW)] = None,
    size: Annotated[Any, typer.Option(metavar="SIZE", help="Of two sets of images: 32, or 48x64 (height x width).  [default: that of all images]", parser=reading(parse_size), rich_help_panel=_HOW)] = None,
    batch_size: Annotated[int, typer.Option(metavar="COUNT", help="Images at once.", parser=reading(parse_count))] = 64,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.  [default: auto]", parser=reading(parse_device))] = None,
    devices: Devices = None,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="What the model computes in; features are of fp32.")] = "fp32",
    sheet: Annotated[Path | None, typer.Option(metavar="X.png", help="Draw samples beside the training images nearest to them. DATA is then what CKPT was trained on, and all of it is compared.", rich_help_panel=_SHEET)] = None,
    sheet_of: Annotated[int, typer.Option(metavar="COUNT", help="How many samples to draw there.", parser=reading(parse_count), rich_help_panel=_SHEET)] = 8,
    overwrite: Annotated[bool, switch("--overwrite", "Replace the sheet that is there.", _SHEET)] = False,
    no_cache: Annotated[bool, switch("--no-cache", "Neither take images and features from the cache, nor keep them.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Tell how good a model's images are: KID, Frechet distance, precision and recall, loss and bits per dimension.

    Needs the extra: `pip install 'ddpmctl[metrics]'`. With a folder or .zip of images as CKPT the two sets of images are compared.

    Example: `ddpmctl evaluate runs/photos held-out-photos/ -n 2048`
    """
    from ddpmctl.errors import ConfigError
    from ddpmctl.rows import row_names

    check_choices({
        "--features": (features, row_names("evaluation.features", "FEATURES")),
        "--quality": (quality, row_names("plans", "QUALITIES")),
        "--sampler": (sampler, row_names("core.samplers", "SAMPLERS")),
        "--spacing": (spacing, row_names("core.spacing", "SPACINGS")),
        "--weights": (weights, ("ema", "raw")), "--precision": (precision, ("fp32", "bf16", "fp16")),
    })  # fmt: skip
    counts = {"-n": n, "--steps": steps, "--batch-size": batch_size, "--sheet-of": sheet_of}
    check_ema_length(ema_length, weights)
    _check(counts, guidance, sheet, overwrite)
    console.set_quiet(quiet or as_json)
    two_sets = _is_data(what)
    of_models = {"--quality": quality, "--sampler": sampler, "--steps": steps, "--spacing": spacing, "--class": class_name,
                 "--guidance": guidance if guidance != 1 else None, "--sheet": sheet, "--ema-length": ema_length}  # fmt: skip
    for flag, value in (of_models if two_sets else {"--size": size}).items():
        if value is not None:
            why = "it is images: there is nothing to sample" if two_sets else "a checkpoint: it has its own size"
            raise ConfigError(f"{flag}: {what}: {why}", f"leave {flag} out")
    each = devices_of(devices, device)
    code = spread_over(each)
    if code is not None:
        return code
    from ddpmctl.evaluation.facts import Settings, compare_data, evaluate_model, help_to_evaluate
    from ddpmctl.evaluation.sets import Extractor

    with joined() as ranks:
        target = ranks.device(device or "auto", each)
        if two_sets:
            if ranks.leads:
                extractor = Extractor(features, target, feature_weights, batch_size)
                settings = Settings(data, n, seed, extractor, lambda what: console.reading(what=what), cache=not no_cache)
                _tell(compare_data(what, size, settings), as_json)
            return 0
        from ddpmctl.checkpoint import naming_a_good_one
        from ddpmctl.plans import plan
        from ddpmctl.runfolder import checkpoint_in
        from ddpmctl.sampling import load_model

        compared = Extractor(features, target, feature_weights, batch_size) if ranks.leads else None
        with naming_a_good_one():
            what = ranks.share(checkpoint_in(what) if ranks.leads else None)
            model = load_model(what, str(target), weights=weights, ema_length=ema_length, precision=precision, guidance=guidance)
        tell_model(model)
        model.check_steps(steps)
        way = plan(quality, sampler, steps, spacing)
        if compared is None:
            help_to_evaluate(model, way, class_name, n=n, seed=seed, batch_size=batch_size, ranks=ranks)
            return 0
        settings = Settings(data, n, seed, compared, lambda what: console.reading(what=what), cache=not no_cache)
        facts = evaluate_model(
            model, way, class_name, settings, weights=weights, ema_length=ema_length, batch_size=batch_size,
            sheet_file=sheet, sheet_of=sheet_of, ranks=ranks,
            on_smaller=lambda size: console.warn(f"out of memory: going on with {size} images at once"),
        )  # fmt: skip
        _tell(facts, as_json)
    return 0


def _check(counts: dict[str, int | None], guidance: float, sheet: Path | None, overwrite: bool) -> None:
    """Raise where a flag cannot be meant, before anything takes long."""
    from ddpmctl.errors import ConfigError, OutputError
    from ddpmctl.files import check_place

    check_counts(counts)
    n = counts["-n"] or 0
    if not _FEWEST <= n <= _MOST:
        raise ConfigError(f"-n {n:,}: must be {_FEWEST} to {_MOST:,}", "2048 or more tell models apart")
    check_guidance(guidance)
    if sheet is None:
        return
    if sheet.suffix.lower() != ".png":
        raise ConfigError(f"--sheet {sheet}: must end in .png", f"--sheet {sheet.with_suffix('.png')}")
    if sheet.exists() and not overwrite:
        raise OutputError(f"{sheet}: exists", "choose another name, or add --overwrite")
    check_place(sheet)


def _is_data(what: Path) -> bool:
    """Whether it is images that stand where a checkpoint may; a folder of checkpoints alone is none."""
    from ddpmctl.inspection import kind_of

    return kind_of(what) == "data" and not (what.is_dir() and any(what.glob("step-*.pt")))


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    """What was compared and how, then a line for each number."""
    if as_json:
        console.result(json.dumps(facts, indent=2))
        return
    for line in (_compared(facts), _how(facts)):
        console.result(shown(line))
    for name, text in _numbers(facts):
        console.result(f"{name:<10} {shown(text)}")
    for text in facts["warnings"]:
        console.warn(text)


def _compared(facts: dict[str, Any]) -> str:
    what, data = facts["what"], facts["data"]
    height, width = data["size"]
    ours = f"{what.get('used', 0):,} of {what.get('images', 0):,} images of {what['path']}"
    if what["kind"] == "model":
        model = f"{what['path']}, {weights_text(what['weights'], what['step'], what['ema_length'])}, {what['device']}, {what['precision']}"
        ours = f"{facts['made_with']['n']:,} samples of {model}"
    trained = " (what it was trained on)" if data.get("trained_on") else ""
    return f"{ours}; against {data['used']:,} of {data['images']:,} images of {data['path']}{trained}; {height}x{width}"


def _how(facts: dict[str, Any]) -> str:
    made, features = facts["made_with"], facts["features"]
    parts = [f"seed {made['seed']}", f"features {features['name']} ({features['dimension']:,}, {features['note']})"]
    if "sampler" in made:
        guided = f", guidance {made['guidance']:g}" if made["guidance"] != 1 else ""
        of_class = f", class {made['class']}" if made["class"] else ""
        parts.insert(0, f"{made['sampler']}, {made['steps']} steps ({made['evaluations']} evaluations), "
                        f"{made['spacing']} spacing, threshold {made['threshold']}{guided}{of_class}")  # fmt: skip
    return "; ".join(parts)


def _numbers(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each number, with what it was computed from."""
    found = facts["distances"]
    yield "KID", f"{found['kid']:.5f} ± {found['kid_spread']:.5f}   {found['subsets']} subsets of {found['subset_size']:,}"
    yield "Frechet", f"{found['frechet']:.4g}"
    yield "precision", f"{found['precision']:.3f}   k = {found['neighbours']}"
    yield "recall", f"{found['recall']:.3f}   k = {found['neighbours']}"
    if "loss" in facts:
        loss = facts["loss"]
        quarters = " ".join(f"{part:.4g}" for part in loss["quarters"])
        yield "loss", (f"{loss['mean']:.4g}   {loss['kind']}, by quarter of t {quarters}; {loss['draws']} draws over "
                       f"{loss['images']} {loss['of']}")  # fmt: skip
        bits = facts["bits_per_dim"]
        for name, part in bits["variance"].items():
            error = f" ± {part['error']:.3f}" if part["error"] is not None else ""
            yield "bits/dim", (f"{part['mean']:.3f}{error}   at most, with variance {name} and all T steps; "
                               f"{bits['images']} {bits['of']}, {bits['draws']} draws of t each")  # fmt: skip
    if "memorised" in facts:
        yield from _memorised(facts["memorised"])


def _memorised(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("pixels", "features"):
        part = found[name]
        if part["share"] is None:
            yield "memorised", f"unknown by {name}: nothing was held out in training to compare with"
            continue
        yield "memorised", (f"{part['share']:.1%} of the samples by {name}: nearer to one of {found['training']:,} training "
                            f"images than {part['threshold']:.4g}, as {found['quantile']:.0%} of {found['held_out']:,} "
                            "held-out images are")  # fmt: skip
    yield "sheet", found["sheet"]
