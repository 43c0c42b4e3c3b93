# ruff: noqa: E501
"""Chat templates that would never end, need all memory, overflow the stack, or escape."""


def _doubling(start: str, step: str, use: str = "{{ ns.s | length }}") -> str:
    """Returns a template that applies `step` 60 times."""
    loop = "{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}".replace("STEP", step)
    return "{% set ns = namespace(s=START) %}".replace("START", start) + loop + use


_DEEP_USES = """{{ ns.s }} {{ ns.s | tojson }} {{ ns.s == [ns.s] }} {{ ns.s | string }} {{ ns.s | pprint }}
{{ '%r' % ns.s }} {{ '%s' % (ns.s,) }} {{ '{!r}'.format(ns.s) }} {{ ns.s | sort }} {{ ns.s | max }}
{{ ns.s in [ns.s[0]] }} {{ ns.s | sum }} {{ ns.s | urlencode }} {{ [ns.s] | map('string') | list }}
{{ ns.s | join }} {{ ns.s | wordcount }} {{ ns.s | striptags }} {{ ns.s is lower }} {{ [ns.s, ns.s] | unique | list }} {{ ns.s is eq ns.s[0] }} {{ ns.s | upper }}
{{ [ns.s[0], ns.s].index(ns.s) }} {{ {'class': ns.s} | xmlattr }} {{ ns.s < ns.s[0] }}
{{ [{'a': ns.s}, {'a': ns.s}] | groupby('a') }} {{ raise_exception(ns.s) }}
{% for m in range(3) %}{{ loop.changed(ns.s) }}{% endfor %}"""
_HASH_USES = """{{ {ns.s: 1} }} {{ ns.s in {} }} {{ {}.get(ns.s) }} {{ {}[ns.s] }} {{ dict([(ns.s, 1)]) }}
{{ [ns.s] | unique | list }} {{ messages | attr(ns.s) }} {{ ns.s is filter }} {{ messages | map(ns.s) | list }}
{{ messages | select(ns.s) | list }} {{ messages[ns.s] }} {{ [1].index(ns.s) }}"""


def _uses(lines: str) -> list[str]:
    """Splits at the spaces between `{{ }}` or `{% %}` and those after them."""
    parts = lines.replace("\n", " ").replace("}} {", "}}\n{").splitlines()
    return [part.strip() for part in parts]


UNBOUNDED = [
    "{{ 10 ** (10 ** 8) }}",
    "{{ 7 ** 7 ** 7 ** 7 ** 7 ** 7 }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ (0,) * 10 ** 9 }}",
    "{% for a in range(10 ** 9) %}x{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    + "{% endfor %}" * 3,
    "{% for a in range(99999) if false %}{% endfor %}" * 100,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}"
    "{% endmacro %}{{ g() }}",
    "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{{ 'x' | indent(10 ** 9, true) }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ 'x'.rjust(10 ** 9) }}",
    "{{ 'x'.zfill(10 ** 9) }}",
    "{{ '\t'.expandtabs(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' is odd }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%.1000000000f' % 1.0 }}",
    "{{ '%1000000000s' % 'x' }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ '{:.1000000000f}'.format(1.5) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ ('%s' * 10 ** 6) % (range(10 ** 5) | list) }}",
    "{{ lipsum(10 ** 9) }}",
    "{% for i in range(99999) %}{{ lipsum(100) }}{% endfor %}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ 1 | round(10 ** 9) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{{ 'x' | batch(10 ** 9, 'y') | list }}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ ('f' * 100000) | int(base=16) }}",
    "{{ ('<!--' * 10 ** 6) | striptags }}",
    "{{ ('-' * 10 ** 6) | wordwrap(10) }}",
    "{{ ('http://' * 10 ** 5) | urlize }}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{{ x.count('b') }}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99) %}{{ x }}{% endfor %}",
    "{% set x = range(99999) | list %}{% for i in range(99999) %}{{ -1 in x }}{% endfor %}",
    "{% set x = range(99999) | list %}{% for i in range(99999) %}{{ x.index(9998) }}{% endfor %}",
    "{% set x = range(99999) %}{% for i in x %}{{ x | map('string') | first }}{% endfor %}",
    _doubling("'aa'", "ns.s + ns.s"),
    _doubling("'aa'", "ns.s ~ ns.s"),
    _doubling("'aa'", "ns.s.replace('a', 'aa')"),
    _doubling("'aa'", "ns.s | replace('', 'aa')"),
    _doubling("'aa'", "ns.s.join([ns.s, ns.s])"),
    _doubling("'aa'", "'%s%s' % (ns.s, ns.s)"),
    _doubling("'aa'", "'{0}{0}'.format(ns.s)"),
    _doubling("'aa'", "ns.s | tojson | tojson"),
    _doubling("[1]", "ns.s + ns.s"),
    _doubling("7", "ns.s * ns.s"),
    *[_doubling("'a'", "[ns.s, ns.s]", use) for use in _uses(_DEEP_USES)],
    *[_doubling("(1, 2)", "(ns.s, ns.s)", use) for use in _uses(_HASH_USES)],
    *[
        _doubling("(1,)", "(ns.s,)", use).replace("range(60)", "range(9999)")
        for use in _uses("{{ {ns.s: 1} }} {{ ns.s }} {{ ns.s | tojson }} {{ ns.s == ns.s }}")
    ],
    _doubling("[1]", "ns.s | select", "{{ 1 / 0 }}").replace("range(60)", "range(9999)"),
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ x" + ".a" * 5000 + " }}",
    "{{ 1" + " + 1" * 9999 + " }}",
    "{{ 'x'" + " | upper" * 5000 + " }}",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "{{ " * 10000,
    "{# " * 10000,
    "{{ 9" + "9" * 100000 + " }}",
    "x" * 200_001,
]

ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__ }}",
    "{{ ''.format.__globals__.x }}",
    "{{ '{0.__class__.__mro__.x}'.format('') }}",
    "{{ ('' | attr('__class__')).x }}",
    "{{ messages | map(attribute='__class__.__base__') | list }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace(_a=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ ''.encode() }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% break %}",
    "{{ 1 / 0 }}",
    "{{ none() }}",
    "{{ messages | nope }}",
    "{{ undefined.thing }}",
    "{% if %}",
]
