"""Answer a file of questions with a trained model: the command.

    python -m minimind.answer --checkpoint RUN_OR_STEP_OR_EXPORT --input prompts.jsonl --output answers.jsonl

Interrupted at any moment, the same command continues.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from minimind.checkpoints.formats.load_model import load_model
from minimind.cli import parse_flags
from minimind.data.chat_template import load_chat_template
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.errors import UserError, run_main
from minimind.files import hash_file
from minimind.inference.answer_file import RESPONSE, AnswerFile, Question, count_exact_matches, read_questions
from minimind.inference.answer_reader import reader_after
from minimind.inference.device import ModelFlags, choose_device
from minimind.inference.generation import Continuation, complete_in_turn
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import prepare_decoding
from minimind.schema import AT_LEAST_0, AT_LEAST_1, check_fields


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(ModelFlags, GenerationOptions):
    """Answer a file of questions: each line as before, with the answer as "response"."""

    input: Path
    """JSON lines with conversations, of the forms of data_prep.tokenize_chat, or with a "prompt"; an answer at the end
    of a conversation is left out."""
    output: Path
    """JSON lines for the answers, in the order of the questions."""
    expect: str | None = None
    """Field with the expected answer: the share of exact matches is printed."""
    thinking: bool | None = None
    """Whether the model thinks first, where its chat template can choose; None: as the template has it."""
    max_batch_size: Annotated[int, AT_LEAST_1] = 8
    """Questions answered together."""
    temperature: Annotated[float, AT_LEAST_0] = 0.0
    """Divides the scores before the draw; 0 always takes the most likely token (greedy)."""
    seed: int | None = 0
    """The same seed, the same draws; the question in line i draws with seed + i. None: random."""

    def __post_init__(self) -> None:
        check_fields(AnswerFlags, vars(self))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = parse_flags(AnswerFlags, args, prog="python -m minimind.answer")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    num_questions = sum(1 for _ in read_questions(flags.input, flags.expect))
    if not num_questions:
        raise UserError(f"input {flags.input} holds no question")
    remedies = [f"lower --max-batch-size {flags.max_batch_size}", f"lower --max-new-tokens {flags.max_new_tokens}"]
    with explain_out_of_memory(device, remedies):
        model, tokenizer_file = load_model(flags.checkpoint, dtype=dtype, device=device, tokenizer=flags.tokenizer)
        settings = describe(flags, model)
        prepare_decoding(model, int8=flags.int8)
        with AnswerFile(flags.output, settings) as answers:
            if answers.is_complete:
                print(f"{flags.output} is complete: nothing to do")
            else:
                answer_questions(model, load_tokenizer(tokenizer_file), flags, answers, num_questions)
                print(f"{num_questions:,} answers in {flags.output}")
    if flags.expect is not None:
        hits, total = count_exact_matches(flags.output, flags.expect)
        print(f"exact match: {hits} of {total} ({hits / total:.1%})")


def describe(flags: AnswerFlags, model: MiniMindForCausalLM) -> dict[str, Any]:
    """What decides the answers."""
    own = {"thinking": flags.thinking, "int8": flags.int8}
    return {"input": hash_file(flags.input), "weights": fingerprint(model), **sampling_of(flags), **own}


def fingerprint(model: MiniMindForCausalLM) -> str:
    """Tells models apart by the first numbers of each tensor: training changes them all."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        first = tensor.flatten()[:64].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def answer_questions(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, flags: AnswerFlags, answers: AnswerFile, num_questions: int
) -> None:
    """Answer what is not answered yet, and write the file.

    Raises:
        UserError: a question is longer than the model can read (before any is answered).
    """
    for _ in make_rows(model, tokenizer, flags, ()):
        pass  # a question that cannot be answered is found now, not hours later
    rows = make_rows(model, tokenizer, flags, answers.numbers)
    with tqdm(total=num_questions, desc="answering", unit="answer", disable=not sys.stderr.isatty()) as bar:
        bar.update(len(answers.numbers))
        for row in complete_in_turn(model, tokenizer.vocab_size, rows, flags.max_batch_size):
            answers.add(row.question, row.response())
            bar.update()
    answers.publish()


class QuestionRow(Continuation):
    """The answer to a question as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], options: GenerationOptions, question: Question) -> None:
        super().__init__(tokenizer, prompt, options)
        self.question = question
        self._reader = reader_after(tokenizer, prompt, question.tools)

    def response(self) -> dict[str, Any]:
        """The fields that the answer adds to its question's."""
        done = self.completion()
        self._reader.push(done.text)
        self._reader.finish()
        end = self._reader.name_end(done.reason)
        return {RESPONSE: self._reader.message(), "finish_reason": end, "num_tokens": len(done.token_ids)}


def make_rows(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, flags: AnswerFlags, answered: Container[int]
) -> Iterator[QuestionRow]:
    """The questions that are not answered yet, with as many tokens for each as there is room for."""
    template, positions = load_chat_template(tokenizer), model.config.max_position_embeddings
    for question in read_questions(flags.input):
        if question.number in answered:
            continue
        try:
            prompt = template.encode_prompt(question.messages, question.tools, thinking=flags.thinking)
            if len(prompt) >= positions:
                raise UserError(f"a question of {len(prompt)} tokens is beyond the model's {positions} positions")
        except UserError as error:
            raise UserError(f"{flags.input} line {question.number}: {error}") from None
        options = {
            **sampling_of(flags),
            "seed": None if flags.seed is None else flags.seed + question.number,
            "max_new_tokens": min(flags.max_new_tokens, positions - len(prompt)),
        }
        yield QuestionRow(tokenizer, prompt, GenerationOptions(**options), question)


def sampling_of(flags: AnswerFlags) -> dict[str, Any]:
    """The flags that are fields of `GenerationOptions`."""
    return {field.name: getattr(flags, field.name) for field in dataclasses.fields(GenerationOptions)}


if __name__ == "__main__":
    run_main(main)
