"""A small decoder with grouped heads, trained on the documentation that comes with Python, byte by byte.

    python -m benchmarks.train_decoder     about five minutes on one thread; writes .cache/decoder.safetensors

Nothing is downloaded: the text is ``pydoc_data.topics``, of which the last tenth is held out. Needs transformers.
"""

import math
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHTS = Path(__file__).parent / ".cache" / "decoder.safetensors"
CONTEXT, BATCH, SECONDS = 256, 8, 300
PEAK_RATE, WARM_UP = 3e-3, 0.03


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and bytes held out."""
    content = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def untrained() -> LlamaForCausalLM:
    """Three layers, 4 query heads on 2 key heads, d = 32: half a million parameters."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def batch_of(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([data[start : start + CONTEXT] for start in starts])


def bits_per_byte(model: LlamaForCausalLM, data: torch.Tensor) -> float:
    """Mean over 16 windows."""
    model.eval()
    windows = data[: 16 * CONTEXT].reshape(16, CONTEXT)
    with torch.inference_mode():
        return float(model(windows, labels=windows).loss) / math.log(2)


def train(seconds: float) -> LlamaForCausalLM:
    """Train for so many seconds; the rate rises, then falls to zero along a cosine."""
    data, held_out = text()
    model, generator = untrained(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
    start, step = time.monotonic(), 0
    model.train()
    while (done := (time.monotonic() - start) / seconds) < 1:
        warm = min(1.0, done / WARM_UP + 0.01)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * warm * (1 + math.cos(math.pi * done)) / 2
        batch = batch_of(data, generator)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{step} steps, {float(loss) / math.log(2):.2f} bits a byte", flush=True)
    print(f"{step} steps, held out {bits_per_byte(model, held_out):.2f} bits a byte", flush=True)
    return model


def load() -> LlamaForCausalLM:
    """Return the trained decoder, in eval mode."""
    from safetensors.torch import load_file

    model = untrained()
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    model.tie_weights()
    return model.eval()


def main() -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    model = train(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
    WEIGHTS.parent.mkdir(exist_ok=True)
    weights = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, WEIGHTS)


if __name__ == "__main__":
    main()
