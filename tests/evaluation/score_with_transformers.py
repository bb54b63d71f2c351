"""Log-likelihoods by `transformers`, one request at a time.

Runs under a Python with torch and transformers (`make test-parity` makes one; it needs nothing of
this project):

    score_with_transformers.py CHECKPOINT REQUESTS.json SCORES.json

REQUESTS holds `[[context ids, continuation ids], ...]`, SCORES becomes `[[log-likelihood, greedy],
...]`. A context that does not fit loses its beginning.
"""

# pyright: reportMissingImports=false

import json
import sys
import warnings


def main():
    warnings.simplefilter("ignore")
    checkpoint, requests, scores = sys.argv[1:]
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype="float32"
    ).eval()
    longest = model.config.max_position_embeddings
    found = []
    with open(requests) as file, torch.no_grad():
        for context, continuation in json.load(file):
            tokens = torch.tensor([(context + continuation)[-(longest + 1) :]])
            logits = model(tokens[:, :-1]).logits[0, -len(continuation) :].double()
            wanted = tokens[0, -len(continuation) :]
            chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
            found.append([chosen.sum().item(), bool((logits.argmax(-1) == wanted).all())])
    with open(scores, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
