"""``ddpmctl evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Devices, Quiet, choices, complete, reading, switch, tell_model, weights_text
from ddpmctl.cli.together import devices_of, joined, spread_over
from ddpmctl.errors import OutputError
from ddpmctl.evaluation.comparison import SHEET_OF
from ddpmctl.parsing import parse_count, parse_device, parse_size, shown

_HOW, _SHEET = "How", "Memorisation"


def evaluate(
    what: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint or run folder; or a second folder or .zip of images.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder or .zip of real images, tar shards, torchvision:NAME or hf:NAME.")],
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
    sheet_of: Annotated[int, typer.Option(metavar="COUNT", help="How many samples to draw there.", parser=reading(parse_count), rich_help_panel=_SHEET)] = SHEET_OF,
    overwrite: Annotated[bool, switch("--overwrite", "Replace the sheet that is there.", _SHEET)] = False,
    no_cache: Annotated[bool, switch("--no-cache", "Neither take images and features from the cache, nor keep them.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Tell how good a model's images are: KID, Frechet distance, precision and recall, loss and bits per dimension.

    Needs the extra: `pip install 'ddpmctl[metrics]'`. With a folder or .zip of images as CKPT the two sets of images are compared.

    Example: `ddpmctl evaluate runs/photos held-out-photos/ -n 2048`
    """
    from ddpmctl.data.names import place_of
    from ddpmctl.evaluation.comparison import Comparison
    from ddpmctl.plans import Recipe

    console.set_quiet(quiet or as_json)
    recipe = Recipe(quality, sampler, steps, spacing, guidance=guidance)
    asked = Comparison(
        place_of(what), place_of(data), recipe, n=n, features=features, feature_weights=feature_weights, class_name=class_name, seed=seed, weights=weights,
        ema_length=ema_length, size=size, batch_size=batch_size, precision=precision, sheet=sheet, sheet_of=sheet_of,
        overwrite=overwrite, cache=not no_cache,
    )  # fmt: skip
    each = devices_of(devices, device)
    code = spread_over(each)
    if code is not None:
        return code
    with joined() as ranks:
        facts = asked.run(ranks, ranks.device(device or "auto", each), told=tell_model, warn=console.warn,
                          bars=lambda what: console.reading(what=what))  # fmt: skip
        if ranks.leads:
            _tell(facts, as_json)
    if unwritten := facts.get("memorised", {}).get("sheet_error"):
        raise OutputError(unwritten, "the numbers are whole; give the sheet another place")
    return 0


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
    if found["sheet"]:
        yield "sheet", found["sheet"]
