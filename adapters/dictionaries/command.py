"""`nla-lens features`: what the AV says of a dictionary's latents, from the command line."""

from __future__ import annotations

from typing import Any

import click

from nla_lens.cli.command import Command
from nla_lens.cli.options import halves_options, load_nla, loading_options_beside_another
from nla_lens.cli.output import print_json, print_table
from nla_lens.errors import NLAError


@click.command(
    cls=Command,
    short_help="Say in words what latents of a dictionary stand for.",
    examples=[
        "nla-lens features my-sae --latents 7560,12",
        "nla-lens features owner/name --latents 0:64 --out latents.jsonl",
    ],
)
@click.argument("sae")
@click.option("--latents", help='Which: "7560", "7560,12", "0:64"; default: all.')
@click.option("--subfolder", "sae_subfolder", help="Which dictionary, where SAE has several.")
@click.option("--filename", help="Which weights file, where SAE has several.")
@click.option("--format", "format_name", help="Whose format it is in, where nothing proves one.")
@click.option("--hook-name", help="Where it reads, where its files do not say, or say it wrongly.")
@click.option("--out", help="A file of JSON lines; goes on where an earlier run stopped.")
@click.option("--sign", default=1, show_default=True, help="-1 reads the opposite directions.")
@click.option("--max-new-tokens", default=200, show_default=True, help="Longest explanation.")
@click.option("--batch-size", type=int, help="Most latents at once; default: from free memory.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout, no table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Also write a page to this file.")
@click.option("--neuronpedia", help="Also write Neuronpedia's explanation lines to this file.")
@click.option("--neuronpedia-model", help="Neuronpedia's name of the model.")
@click.option("--neuronpedia-source", help="Neuronpedia's name of the dictionary.")
@halves_options
@loading_options_beside_another
def features(
    sae: str,
    latents: str | None,
    sae_subfolder: str | None,
    filename: str | None,
    format_name: str | None,
    hook_name: str | None,
    out: str | None,
    sign: int,
    max_new_tokens: int,
    batch_size: int | None,
    as_json: bool,
    html: str | None,
    neuronpedia: str | None,
    neuronpedia_model: str | None,
    neuronpedia_source: str | None,
    **options: Any,
) -> None:
    """Say in words what latents of the dictionary SAE stand for.

    SAE is a directory, a weights file, a hub repository or a folder or file in one: SAELens,
    Goodfire, qresearch, Gemma Scope 2, Llama Scope, Qwen Scope, sparsify or dictionary_learning.
    cos compares a latent's direction with what the explanation alone reconstructs.
    """
    from nla_lens.adapters.dictionaries.latents import Latents
    from nla_lens.adapters.sae import explain_features, load_dictionary

    if neuronpedia and not (neuronpedia_model and neuronpedia_source):
        raise NLAError("--neuronpedia needs --neuronpedia-model and --neuronpedia-source")
    dictionary = load_dictionary(
        sae, subfolder=sae_subfolder, filename=filename, hook_name=hook_name, format=format_name
    )
    chosen = parse_latents(latents, Latents(dictionary).d_sae)
    nla = load_nla(**options)
    found = explain_features(
        nla,
        dictionary,
        chosen,
        sign=sign,
        store=out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if html:
        found.to_html(html)
    if neuronpedia:
        found.to_neuronpedia(
            neuronpedia, model_id=str(neuronpedia_model), source_id=str(neuronpedia_source)
        )
    if as_json:
        for line in found.to_dict():
            print_json(line)
    else:
        print_table(found.to_table(title=sae))


def parse_latents(latents: str | None, d_sae: int) -> list[int] | None:
    """Reads "7560", "7560,12" or "0:64".

    Raises:
        NLAError: Something else.
    """
    if latents is None:
        return None
    try:
        if ":" in latents:
            first, last = (int(p) if p.strip() else None for p in latents.split(":"))
            return list(range(d_sae))[first:last]
        return [int(p) for p in latents.split(",")]
    except ValueError:
        pass
    raise NLAError(f'--latents {latents!r} is not of the form "7560", "7560,12" or "0:64"')
