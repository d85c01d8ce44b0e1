"""Answers sampled by an OpenAI-compatible server that is given the weights in training: vLLM, or `minimind.serve`.

The server gives back the ids of the tokens that it has drawn, and those are trained.
"""

import http.client
import json
import math
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoints.folder import checkpoint_name
from minimind.checkpoints.formats.export import ExportFlags, export
from minimind.checkpoints.formats.layout import own_shapes
from minimind.checkpoints.formats.source import ModelSource
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES
from minimind.data.tokenizer import Tokenizer
from minimind.distributed.collectives import gather_objects
from minimind.errors import UnmadeStep, UserError, first_line
from minimind.inference.decoding import TokenLogprobs
from minimind.model import MiniMindForCausalLM
from minimind.model.lora import merge
from minimind.model.tuning import adapters_of
from minimind.parallel.whole_model import gather_model
from minimind.training.rewards.pool import RewardPool
from minimind.training.rewards.rollout import Rollout, sample_answers

KEY_VARIABLE = "MINIMIND_API_KEY"
"""Environment variable with the key that the server wants, if any."""
WEIGHTS_NAME = "rollout_weights"
"""Folder of a run: the weights that the server has, for transformers and vLLM."""
LARGEST_GAP = 0.5
"""Nats between the server's log-probabilities of an answer and those by the weights that it was given, a mean over the
tokens: more is no rounding, in bf16 or 8 bits either."""
_REFUSED = (404, 405)


class RolloutServer:
    """The server of a run. Every rank asks it for its own answers; rank 0 gives it the weights."""

    def __init__(self, resolved: ResolvedRun, tokenizer: Tokenizer) -> None:
        self._resolved, self._train, self._tokenizer = resolved, resolved.train, tokenizer
        self._url = (resolved.train.rollout_server or "").rstrip("/").removesuffix("/v1")
        self._threads = ThreadPoolExecutor(resolved.train.rollout_batch_size, thread_name_prefix="rollouts")
        self._given: int | None = None  # the step whose weights the server has

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def answer(self, engine: Any, rows: Sequence[Rollout], pool: RewardPool, places: int) -> list[Rollout]:
        """As `sample_answers`, by the engine's present weights. Every rank calls this.

        Raises:
            UnmadeStep: on every rank: the server is not there, takes too long or answers what cannot be trained on.
        """
        step, last, model, failures = engine.global_steps, list(rows), None, list[str]()
        if self._given != step:
            model = gather_model(engine, self._resolved)
            failures = gather_objects(self._give_weights(model, step))
        if not any(failures):
            self._given, failure = step, ""
            try:
                last = sample_answers(self._complete, rows, self._train, pool, places)
                if model is not None and last:
                    self._check_weights(model, last[0])
            except UserError as error:
                failure = str(error)
            failures = gather_objects(failure)
        if failure := next(filter(None, failures), ""):
            self._given = None
            raise UnmadeStep(f"after step {step}: rollout_server {failure}; see to it and run the same command again")
        return last

    def _give_weights(self, model: MiniMindForCausalLM, step: int) -> str:
        """Have the server load a model's weights from a folder of the run; why that failed, in words. Rank 0 alone."""
        folder = Path(self._train.run_dir).resolve() / WEIGHTS_NAME / checkpoint_name(step)
        if torch.distributed.get_rank():
            return ""
        tensors, lora = model.state_dict(), self._train.lora

        def read(name: str) -> Any:
            weight = tensors[name]
            if lora is not None and lora.has(name):
                first, second = adapters_of(name)
                weight = merge(weight, tensors[first], tensors[second], lora.scale)
            return weight.cpu()

        source = ModelSource(folder, model.config, own_shapes(model.config), read, self._tokenizer.file)
        try:
            export(source, ExportFlags(checkpoint=folder, output=folder, dtype=self._train.precision))
            # The interface of vLLM, whose every worker calls the method.
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except UserError as error:
            return str(error)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return ""

    @torch.inference_mode()
    def _check_weights(self, model: MiniMindForCausalLM, row: Rollout) -> None:
        """Raise `UserError` when the server has drawn an answer by other weights than these."""
        device, first = model.lm_head.weight.device, len(row.question.token_ids)
        ids = torch.tensor([row.token_ids], device=device)
        dtype = getattr(torch, DTYPE_NAMES[self._train.precision])
        with torch.autocast(device.type, dtype, enabled=self._resolved.zero.autocast):
            logits = model(ids).logits
        own = logits[0, first - 1 : -1].float().log_softmax(-1).gather(1, ids[0, first:, None])[:, 0]
        gap = float((own.cpu() - torch.tensor([one.logprob for one in row.logprobs])).abs().mean())
        if not gap < LARGEST_GAP:
            raise UserError(
                f"{self._url}: its log-probabilities are {gap:.2f} nats from those by the weights given to it"
            )

    def _complete(self, rows: Sequence[Rollout]) -> None:
        """Let the server continue each row to its end. Raises `UserError`."""
        salt = uuid.uuid4().hex  # keys and values of these prompts under other weights are no use
        without_text = range(self._tokenizer.vocab_size, self._resolved.model.vocab_size)
        bodies = [
            {
                "prompt": row.tokens,
                "max_tokens": row.options.max_new_tokens,
                "temperature": row.options.temperature,
                "seed": row.random.getrandbits(48),
                # vLLM takes what is left out from the model's generation_config.json.
                "top_p": 1.0,
                "repetition_penalty": 1.0,
                "logit_bias": dict.fromkeys(without_text, -100),
                "logprobs": 0,
                "return_token_ids": True,
                "cache_salt": salt,
            }
            for row in rows
        ]
        replies = self._threads.map(lambda body: self._post("/v1/completions", body), bodies)
        for row, reply in zip(rows, replies, strict=True):
            self._take(row, reply)

    def _take(self, row: Rollout, reply: Any) -> None:
        try:
            (choice,) = reply["choices"]
            ids, log_probs = choice.get("token_ids"), choice["logprobs"]["token_logprobs"]
            pairs = [] if ids is None else list(zip(ids, log_probs, strict=True))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{self._url}: no answer with log-probabilities: {json.dumps(reply):.120}") from None
        if ids is None:
            raise UserError(f"{self._url} gives no token ids (return_token_ids); take vLLM or minimind.serve")
        for token, log_prob in pairs:
            is_number = isinstance(log_prob, int | float) and math.isfinite(log_prob)
            if type(token) is not int or not 0 <= token < self._tokenizer.vocab_size or not is_number:
                raise UserError(f"{self._url}: token {token} with log-probability {log_prob} cannot be trained on")
            if row.reason is not None:
                raise UserError(f"{self._url} goes on after the token that ends an answer; serve an export of the run")
            row.logprobs.append(TokenLogprobs(token, log_prob, []))
            row.take(token)
        if row.reason is None:
            raise UserError(f"{self._url} ends an answer after {len(pairs)} of {row.options.max_new_tokens} tokens")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server replies. Raises `UserError`."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, '')}"}
        url, end = self._url + path, time.monotonic() + self._train.rollout_seconds
        while True:
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self._train.rollout_seconds) as reply:
                    return json.loads(reply.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 429 or time.monotonic() > end:  # 429: its queue is full
                    fix = "; start vLLM with VLLM_SERVER_DEV_MODE=1, minimind.serve with --accept-weights"
                    said = error.read().decode(errors="replace").strip()[:200].replace("\n", " ")
                    raise UserError(f"{url}: {error.code} {said}{fix if error.code in _REFUSED else ''}") from None
                time.sleep(0.5)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise UserError(f"{url}: {first_line(error)}") from None
