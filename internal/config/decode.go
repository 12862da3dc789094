package config

import (
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"
)

// Error is one mistake in a configuration file.
type Error struct {
	File   string // empty: whoever asked knows
	Line   int    // counted from 1; 0: the mistake is nowhere in particular
	Key    string // "store.segment_size"; empty: the text is no TOML
	Reason string // what is wrong, and what is allowed
}

// Error gives file, line, key and reason on one line.
func (e *Error) Error() string {
	where := e.File
	if e.Line > 0 {
		where = strings.TrimPrefix(fmt.Sprintf("%s, line %d", e.File, e.Line), ", ")
	}
	parts := slices.DeleteFunc([]string{where, e.Key, e.Reason}, func(s string) bool { return s == "" })
	return oneLine(strings.Join(parts, ": "))
}

// oneLine writes as Go would what does not print: the library repeats what it found in
// the file, line ends included.
func oneLine(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRune(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// Decode reads the TOML text of file into the struct that dst points to, whose
// fields carry toml tags; what the text does not name stays as it is. Keys are
// taken as they are spelled and values as they are typed, where the library
// would let Listen pass for listen. The error joins an [Error] for each mistake.
func Decode(file, text string, dst any) error {
	return decode(file, text, dst, make(origins))
}

// origins says where each key, "store.sync", was last set.
type origins map[string]origin

type origin struct {
	file string
	line int
}

func decode(file, text string, dst any, from origins) error {
	var top map[string]toml.Primitive
	meta, err := toml.Decode(text, &top)
	if err != nil {
		return syntaxError(file, err)
	}
	d := decoder{file: file, meta: meta, from: from}
	d.table(nil, top, reflect.ValueOf(dst).Elem())
	// The library gives keys in a map's order; people read from the top.
	slices.SortFunc(d.errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
	return join(d.errs)
}

func syntaxError(file string, err error) error {
	if perr, ok := errors.AsType[toml.ParseError](err); ok {
		return &Error{File: file, Line: perr.Position.Line, Reason: perr.Message}
	}
	return &Error{File: file, Reason: err.Error()}
}

func join(errs []*Error) error {
	all := make([]error, len(errs))
	for i, e := range errs {
		all[i] = e
	}
	return errors.Join(all...)
}

type decoder struct {
	file string
	meta toml.MetaData
	from origins
	errs []*Error
}

func (d *decoder) table(path toml.Key, values map[string]toml.Primitive, dst reflect.Value) {
	fields := make(map[string]reflect.Value, dst.NumField())
	for f, v := range dst.Fields() {
		fields[f.Tag.Get("toml")] = v
	}
	for name, value := range values {
		key := append(slices.Clone(path), name)
		line := d.line(value)
		field, known := fields[name]
		switch {
		case !known:
			d.fail(line, key, "unknown key; "+hint(name, fields))
		case field.Kind() == reflect.Struct:
			sub, ok := d.subtable(value)
			if !ok {
				d.fail(line, key, fmt.Sprintf("is a table; write it as [%s], with its keys below", key))
				continue
			}
			d.table(key, sub, field)
		default:
			if err := d.value(value, field); err != nil {
				d.fail(line, key, err.Error())
				continue
			}
			d.from[key.String()] = origin{d.file, line}
		}
	}
}

func (d *decoder) fail(line int, key toml.Key, reason string) {
	d.errs = append(d.errs, &Error{File: d.file, Line: line, Key: key.String(), Reason: reason})
}

func (d *decoder) subtable(p toml.Primitive) (map[string]toml.Primitive, bool) {
	var v any
	if d.meta.PrimitiveDecode(p, &v) != nil {
		return nil, false
	}
	// The library decodes what is no table into a map without a word.
	if _, ok := v.(map[string]any); !ok {
		return nil, false
	}
	var sub map[string]toml.Primitive
	return sub, d.meta.PrimitiveDecode(p, &sub) == nil
}

func (d *decoder) value(p toml.Primitive, field reflect.Value) error {
	var v any
	if err := d.meta.PrimitiveDecode(p, &v); err != nil {
		return err
	}
	return assign(field, v)
}

// line gives the line in which a value's key stands. The library tells it in the
// errors of an Unmarshaler alone, so one is made to fail.
func (d *decoder) line(p toml.Primitive) int {
	if perr, ok := errors.AsType[toml.ParseError](d.meta.PrimitiveDecode(p, &unwilling{})); ok && perr.Position.Line > 0 {
		return perr.Position.Line
	}
	// The table "a" of a lone [a.b] stands nowhere itself.
	first := 0
	sub, _ := d.subtable(p)
	for _, value := range sub {
		if n := d.line(value); first == 0 || n > 0 && n < first {
			first = n
		}
	}
	return first
}

type unwilling struct{}

func (unwilling) UnmarshalTOML(any) error { return errors.New("no value is wanted") }

// hint lists what may stand where name does not.
func hint(name string, fields map[string]reflect.Value) string {
	known := make([]string, 0, len(fields))
	for f := range fields {
		known = append(known, f)
	}
	slices.Sort(known)
	return fmt.Sprintf("in the place of %q there may be %q", name, known)
}

// assign stores a decoded value in a field of one of the kinds that this
// package's structs are made of.
func assign(field reflect.Value, v any) error {
	switch dst := field.Addr().Interface().(type) {
	case toml.Unmarshaler:
		return dst.UnmarshalTOML(v)
	case *string:
		return store(dst, v, `a string in quotes`)
	case *bool:
		return store(dst, v, `true or false`)
	case *int64:
		return store(dst, v, `a whole number`)
	case *int:
		var n int64
		if err := store(&n, v, `a whole number`); err != nil {
			return err
		}
		*dst = int(n) // 64 bits wide wherever castrad runs
		return nil
	case *[]string:
		const want = `a list of strings like ["a", "b"]`
		var list []any
		if err := store(&list, v, want); err != nil {
			return err
		}
		all := make([]string, len(list))
		for i, item := range list {
			if err := store(&all[i], item, want); err != nil {
				return err
			}
		}
		*dst = all
		return nil
	}
	panic("config: no decoder for a field of type " + field.Type().String())
}

func store[T any](dst *T, v any, want string) error {
	got, ok := v.(T)
	if !ok {
		return fmt.Errorf("is %s; it must be %s", describe(v), want)
	}
	*dst = got
	return nil
}

func describe(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("the string %q", v)
	case int64, float64, bool:
		return fmt.Sprintf("%v", v)
	case time.Time:
		return "a date"
	case []any:
		return "a list"
	default:
		return "a table"
	}
}
