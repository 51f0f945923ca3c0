r"""Train two small models that differ in nothing but dropout, for benchmarks/papers/sp_dropout.py.

    python benchmarks/train_dropout.py --dropout 0 --out .models/dropout-0
    python benchmarks/train_dropout.py --dropout 0.1 --out .models/dropout-0.1

A GPT-2 of 4 layers and a tokenizer of 2,048 tokens, trained on the texts of all skills in equal parts: the same texts in the same
order from the same first weights. Dropout is where GPT-2 has it: behind the embedding, on attention patterns, and on what attention
and MLP write.
"""

import argparse

import transformers
from train_experts import options, train


def config_of(args: argparse.Namespace) -> transformers.GPT2Config:
    """Return the model's configuration."""
    return transformers.GPT2Config(
        vocab_size=args.vocabulary,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=6,
        n_positions=args.window,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        resid_pdrop=args.dropout,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, out=".models/dropout-0", width=192, rate=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args()
    model, tokenizer = train(args, lambda: transformers.GPT2LMHeadModel(config_of(args)))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
