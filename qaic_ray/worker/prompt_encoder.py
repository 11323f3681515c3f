"""From a prompt to the text that the model is given, and its token ids."""

from __future__ import annotations

from dataclasses import replace

from qaic_ray.errors import RowError, UsageError
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import ChatOptions, Message, Prompt


class PromptEncoder:
    """Puts prompts into the model's chat template where they are conversations, and tokenizes them.

    Args:
        tokenizer: the checkpoint's.
        generation: the run's, with the date that its templates show.
    """

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self.tokenizer = tokenizer.of_run(generation.chat_template, generation.date)
        self._generation = generation

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids.

        Raises:
            RowError: it has none, or the template refuses it.
        """
        if prompt.token_ids is not None:
            if not prompt.token_ids:
                raise RowError("The prompt is empty: it has no token to start from.")
            return list(prompt.token_ids)
        messages = self._messages(prompt)
        if messages is not None:
            try:
                return self.tokenizer.chat(messages, self._chat_options(prompt))
            except UsageError as error:
                raise RowError(str(error)) from error
        if not prompt.text:
            raise RowError("The prompt is empty: it has no token to start from.")
        return self.tokenizer.encode(prompt.text)

    def text(self, prompt: Prompt) -> str:
        """The text that these are of: a conversation as the template makes it, tokens as they read.

        Raises:
            RowError: the template refuses it.
        """
        if prompt.token_ids is not None:
            return prompt.text or self.tokenizer.decode(prompt.token_ids)
        messages = self._messages(prompt)
        if messages is None:
            return prompt.text
        try:
            return self.tokenizer.chat_template.render(messages, self._chat_options(prompt))
        except UsageError as error:
            raise RowError(str(error)) from error

    def _chat_options(self, prompt: Prompt) -> ChatOptions:
        """The prompt's own, with the run's template variables where it has none of the name."""
        run = self._generation.chat_options
        if prompt.chat is None:
            return run
        kwargs = {**run.template_kwargs, **prompt.chat.template_kwargs}
        return replace(prompt.chat, template_kwargs=kwargs)

    def _messages(self, prompt: Prompt) -> list[Message] | None:
        """The conversation to answer; None for a prompt that is plain text to complete."""
        if prompt.messages is not None:
            messages = list(prompt.messages)
        elif self._generation.chat and prompt.text:
            messages = [{"role": "user", "content": prompt.text}]
        else:
            return None
        return with_system(messages, self._generation.system)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """A conversation as the run makes it: it begins with the run's system message, or its own."""
    first = messages[0].get("role") if messages else None
    if system is None or first in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]
