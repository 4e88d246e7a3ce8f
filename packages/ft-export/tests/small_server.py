"""A small server with vLLM's command line and HTTP interface: a folder's model in transformers, a request at a time.

``--fault NAME`` makes it do otherwise than a server should. Run as ``vllm serve FOLDER …``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("none", "dies", "never up", "silent", "no JSON", "wrong tokens", "wrong model", "template", "stops", "writes")


class Model:
    def __init__(self, folder: str, dtype: str, fault: str) -> None:
        import torch
        import transformers

        self.torch = torch
        self.fault = fault
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if fault == "wrong model":
            self.model.model.layers[0].self_attn.q_proj.weight.data *= 1.5

    def answer(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < count:
            with self.torch.inference_mode():
                logits = self.model(input_ids=self.torch.tensor([[*ids, *tokens]])).logits[0, -1]
            row = self.torch.log_softmax(logits.float(), dim=-1)
            values, best = row.topk(2)
            place = 1 if self.fault == "wrong tokens" and len(tokens) == 3 else 0
            tokens.append(int(best[place]))
            logprobs.append(float(values[place]))
            if tokens[-1] == self.tokenizer.eos_token_id or (self.fault == "stops" and len(tokens) == 2):
                break
        return tokens, logprobs

    def reply(self, path: str, said: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            tokens, logprobs = self.answer(said["prompt"], said["max_tokens"])
            found = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": logprobs}
            return {"choices": [{"logprobs": found}]}
        text = self.tokenizer.apply_chat_template(said["messages"], tokenize=False, add_generation_prompt=True)
        text += " " if self.fault == "template" else ""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens, logprobs = self.answer(ids, said["max_tokens"])
        content = [{"logprob": value} for value in logprobs]
        return {"prompt_token_ids": ids, "choices": [{"token_ids": tokens, "logprobs": {"content": content}}]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--fault", default="none", choices=FAULTS)
    parser.add_argument("--pid", type=Path)
    args, _ = parser.parse_known_args()
    if args.pid:
        args.pid.write_text(str(os.getpid()))
    if args.fault == "dies":
        print("ValueError: no such device")
        return 3
    model = None if args.fault in ("never up", "silent", "no JSON") else Model(args.folder, args.dtype, args.fault)
    if args.fault == "writes":
        (Path(args.folder) / "cache.bin").write_bytes(b"1")

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # or the body waits 40 ms for the headers to be acknowledged

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._send(503 if args.fault == "never up" else 200, b"{}")

        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if args.fault == "silent":
                time.sleep(60)
            self._send(200, json.dumps(model.reply(self.path, said)).encode() if model else b"<html>")

    HTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
