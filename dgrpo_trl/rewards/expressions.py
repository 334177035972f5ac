r"""
The value of an expression of numbers, in bounded time: `\frac{1}{2}`, `1 1/2`, `3 * 10^{5}`, `(\sqrt{2}+\pi)^{500}`.

A value is a `Fraction` as long as it is rational, else a `Decimal` of 60 digits. Nothing is expanded, so that the time
depends on the length of the text alone, and no thread needs a time limit.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction
from math import isqrt
from typing import Any


Value = Fraction | Decimal

_MAX_CHARS = 300
_MAX_DEPTH = 20
_MAX_BITS = 50_000  # of a numerator or denominator
_CONTEXT = Context(prec=60, Emax=20_000, Emin=-20_000, traps=[InvalidOperation, DivisionByZero, Overflow])
_SAME_DIGITS = Fraction(1, 10**40)  # two irrational values that differ by less are equal
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")

TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4}(?![0-9A-Za-z]))?|\.[0-9]+)|(?P<command>\\(?:frac|sqrt|pi)(?![A-Za-z]))"
    r"|(?P<operator>[-+*/^(){}\[\]])"
)


class Unreadable(Exception):
    """The text is no expression, or its value is not finite, not real or too large."""


@dataclass
class _Parser:
    """Recursive descent; `tokens` are texts, in their order."""

    tokens: list[str]
    position: int = 0
    depth: int = field(default=0)

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise Unreadable
        self.position += 1
        return token

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            right = self.product()
            value = _combine(value, right, operator.add if sign == "+" else operator.sub)
        return value

    def product(self) -> Value:
        if self.peek() in ("+", "-"):
            sign = self.take()
            if self.peek() in ("+", "-"):
                raise Unreadable
            value = self.product()
            return _combine(Fraction(0), value, operator.sub) if sign == "-" else value
        value = self.mixed() if self._is_mixed() else self.power()
        while True:
            token = self.peek()
            if token in ("*", "/"):
                self.take()
                value = _combine(value, self.signed_power(), operator.mul if token == "*" else operator.truediv)
            elif token.startswith("\\") or token == "(":
                value = _combine(value, self.power(), operator.mul)
            else:
                return value

    def signed_power(self) -> Value:
        if self.peek() == "-":
            self.take()
            return _combine(Fraction(0), self.power(), operator.sub)
        return self.power()

    def _is_mixed(self) -> bool:
        """Whether a whole number and a fraction follow: `1 1/2`, `1 \\frac{1}{2}`."""
        ahead = self.tokens[self.position : self.position + 4]
        if not ahead or not ahead[0].isdigit():
            return False
        return ahead[1:2] == ["\\frac"] or (len(ahead) == 4 and ahead[2] == "/" and (ahead[1] + ahead[3]).isdigit())

    def mixed(self) -> Value:
        whole = self.atom()
        if self.peek() == "\\frac":
            part = self.atom()
        else:
            part = _combine(self.atom(), (self.take("/"), self.atom())[1], operator.truediv)
        if not 0 < part < 1:
            raise Unreadable
        return _combine(whole, part, operator.add)

    def power(self) -> Value:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        sign = -1 if self.peek() == "-" and self.take() else 1
        exponent = self.power()
        return _power(base, _combine(Fraction(sign), exponent, operator.mul))

    def atom(self) -> Value:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _literal(token)
        if token == "\\pi":
            return _PI
        if token == "\\frac":
            numerator = self.argument()
            return _combine(numerator, self.argument(), operator.truediv)
        if token == "\\sqrt":
            index = self.group("]") if self.peek() == "[" and self.take() else Fraction(2)
            return _root(self.argument(), index)
        if token in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[token])
        raise Unreadable

    def argument(self) -> Value:
        """What TeX takes as an argument: a group, or one digit: `\\frac12`, `\\sqrt2`."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        return self.atom()

    def group(self, closing: str) -> Value:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        value = self.sum()
        self.take(closing)
        self.depth -= 1
        return value


def evaluate(text: str) -> Value | None:
    """The value of an expression, or `None` where there is none."""
    if len(text) > _MAX_CHARS:
        return None
    tokens, end = [], 0
    for match in TOKEN.finditer(text):
        if text[end : match.start()].strip():
            return None
        tokens.append(match[0])
        end = match.end()
    if text[end:].strip():
        return None
    parser = _Parser(tokens)
    try:
        with localcontext(_CONTEXT):
            value = parser.sum()
    except (Unreadable, ArithmeticError, DecimalException):
        return None
    return value if parser.position == len(parser.tokens) else None


def multiply(a: Value, b: Value) -> Value:
    """The product, in the precision of [`evaluate`]."""
    with localcontext(_CONTEXT):
        return _combine(a, b, operator.mul)


def is_same(a: Value, b: Value, has_point: bool) -> bool:
    """Whether two values are equal: exactly, or to 6 digits where one was written with a decimal point."""
    if a == b and isinstance(a, Fraction) and isinstance(b, Fraction):
        return True
    exact_a, exact_b = Fraction(a), Fraction(b)
    difference, size = abs(exact_a - exact_b), max(abs(exact_a), abs(exact_b))
    is_irrational = isinstance(a, Decimal) or isinstance(b, Decimal)
    if is_irrational and difference <= _SAME_DIGITS * (size if exact_a and exact_b else 1):
        return True
    if not has_point:
        return False
    if _terminates(a) and _terminates(b):  # 1000000.4 is not 1000000
        size = min(size, Fraction(1))
    return difference <= size / 10**6


def _terminates(value: Value) -> bool:
    if isinstance(value, Decimal):
        return False
    denominator = value.denominator
    return denominator.bit_length() < 4_000 and 10 ** denominator.bit_length() % denominator == 0


# --- Arithmetic


def _literal(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Unreadable
    return value


def _combine(a: Value, b: Value, operation: Callable[[Any, Any], Any]) -> Value:
    """`operation` in the type that holds both."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(operation(a, b))
    return operation(_decimal(a), _decimal(b))


def _decimal(value: Value) -> Decimal:
    return value if isinstance(value, Decimal) else Decimal(value.numerator) / Decimal(value.denominator)


def _power(base: Value, exponent: Value) -> Value:
    if not isinstance(base, Fraction) or not isinstance(exponent, Fraction) or exponent.denominator != 1:
        return _decimal(base) ** _decimal(exponent)
    num_bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and num_bits * abs(exponent.numerator) > _MAX_BITS:
        raise Unreadable
    return base**exponent.numerator


def _root(value: Value, index: Value) -> Value:
    if index == 2 and isinstance(value, Fraction) and value >= 0:
        numerator, denominator = isqrt(value.numerator), isqrt(value.denominator)
        if numerator**2 == value.numerator and denominator**2 == value.denominator:
            return Fraction(numerator, denominator)
    if index == 2:
        return _decimal(value).sqrt()
    return _power(value, _combine(Fraction(1), index, operator.truediv))
