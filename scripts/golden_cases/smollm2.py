"""The real model of the golden tests: its prompts, and the tokens whose logits are stored."""

# SmolLM2: plain text, code, a chat, digits, other scripts, one word, a long paragraph, a list.
SMOLLM2_PROMPTS = {
    "english": "The capital of France is",
    "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "chat": [{"role": "user", "content": "What is the difference between a lake and a river?"}],
    "digits": "3.14159, 2.71828, 1.41421; 12 + 30 = 42, 7 * 8 = 56, 1024 / 4 =",
    "unicode": "Zürich, São Paulo, Łódź — naïve café 日本語 Привет мир 🙂🚀 is a line with",
    "word": "Hello",
    "paragraph": (
        "The lighthouse stood on a narrow spit of rock a mile from the village, and for most of the year the only way"
        " to reach it was a flat-bottomed boat that the keeper had built himself. He was a patient man. Each morning he"
        " climbed the hundred and nine steps to the lamp, trimmed the wick, wiped the salt from the glass, and wrote"
        " down the direction of the wind in a book with a green cover. In the afternoons he mended nets, although he"
        " no longer fished, because the work kept his hands warm and because the nets were never finished. Ships"
        " passed far out, and on clear days he could read their names through the telescope that his father had left"
        " him. He kept a list of those too. When the first storm of the autumn came, it arrived from the south-west,"
        " which was unusual, and it carried with it a smell of wood smoke and oranges. The keeper lit the lamp an hour"
        " early that evening. He had just sat down to his supper when he heard, quite clearly, above the noise of the"
        " water, somebody knocking at the door. He put down his spoon,"
    ),
    "list": "Shopping list:\n1. Apples\n2. Bread\n3. Cheese\n4.",
}

# Spread over the vocabulary of 49,152; their logits after the prompt are stored.
SMOLLM2_TOKENS = (0, 1, 2, 28, 198, 260, 504, 1234, 4649, 7042, 9999, 16384, 24577, 32768, 40000, 49151)
