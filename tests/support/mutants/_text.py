"""Mutations of chat templates."""

from random import Random

from ._json import OUTSIDE


FRAGMENTS = (
    "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.format.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % messages }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**(10**8) }}",
    "{{ [1] * 10**9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'|center(999999999) }}",
    "{{ ('x' * 10000)|replace('x', 'y' * 100000) }}",
    "{{ 'x'|indent(999999999) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ lipsum(100000) }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages|batch(0)|list }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ messages[0]['nothing'].more }}",
    "{{ nothing.more }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(1, 2) }}",
    "{{ raise_exception }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages|tojson }}",
    "{{ messages|tojson(indent=2, ensure_ascii=False) }}",
    "{{ range|tojson }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{% set messages = 1 %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}",
    "{% include 'x' %}",
    f"{{% include '{OUTSIDE}/secret' %}}",
    f"{{% import '{OUTSIDE}/secret' as x %}}",
    "{% extends 'x' %}",
    "{% break %}",
    "{% for m in messages %}{% break %}{% endfor %}",
    "{% generation %}x{% endgeneration %}",
    "{% if",
    "{{",
    "{# ",
    "%}",
    "{% endfor %}",
    "{% for m in messages %}",
    "{{ bos_token * 3 }}",
    "{{ eos_token }}",
    "<|endoftext|>",
    "\0",
    "\ud800",
    "\ue0f5",
    "(" * 500,
    "{{ " + "(" * 500 + ")" * 500 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
)


def mutate_template(content: bytes, random: Random) -> bytes:
    """Returns a template with a fragment inserted, or a tag removed or repeated."""
    text = content.decode("utf-8", "replace")
    tags = [i for i in range(len(text)) if text.startswith(("{{", "{%"), i)]
    action = random.choice(("insert", "insert", "insert", "replace", "remove", "repeat"))
    if action == "replace":
        text = random.choice(FRAGMENTS)
    elif action == "insert" or not tags:
        at = random.choice([0, len(text), *tags, random.randint(0, len(text))])
        text = text[:at] + random.choice(FRAGMENTS) + text[at:]
    else:
        begin = random.choice(tags)
        end = text.find("}", begin) + 2
        text = text[:begin] + (text[begin:end] * 2 if action == "repeat" else "") + text[end:]
    return text.encode("utf-8", "surrogatepass")
