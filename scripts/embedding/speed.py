"""python -m scripts.embedding.speed --model model_cards/flash-30m-masked

Documents per second that an encoder embeds on one CPU thread, at several lengths, beside a BERT of the same size with
random weights. Time is the process's CPU time, which other programs disturb little.
"""

import argparse
import time

from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.sources import load_named


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--tokens", nargs="+", type=natural, default=[512, 2048, 8192], help="lengths of a document")
    parser.add_argument("--documents", type=natural, default=3, help="per length; the fastest counts")
    args = parser.parse_args()

    import torch
    from transformers import AutoModel, BertConfig, BertModel

    torch.set_num_threads(1)
    flash = load_named(AutoModel.from_pretrained, args.model, option="--model", dtype=torch.float32).eval()
    config = flash.config
    # Two layers of FLASH have the parameters of one of BERT.
    peer = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers // 2,
        num_attention_heads=max(1, config.hidden_size // 64),
        intermediate_size=4 * config.hidden_size,
        max_position_embeddings=max(args.tokens),
    )
    models = {"FLASH": flash, "BERT": BertModel(peer, add_pooling_layer=False).eval()}
    print(f"{'documents per second':<24}" + "".join(f"{tokens:>10,}" for tokens in args.tokens))
    for name, model in models.items():
        cells = []
        for tokens in args.tokens:
            times = []
            for _ in range(args.documents):
                ids = torch.randint(2, config.vocab_size, (1, tokens))
                begin = time.process_time()
                with torch.inference_mode():
                    model(ids).last_hidden_state.mean(1)
                times.append(time.process_time() - begin)
            cells.append(f"{1 / min(times):>10.2f}")
        # Without the table of positions, of which FLASH has none.
        size = sum(p.numel() for key, p in model.named_parameters() if "position" not in key) / 1e6
        print(f"{f'{name}, {size:.1f} M':<24}" + "".join(cells), flush=True)


if __name__ == "__main__":
    run_command(main)
