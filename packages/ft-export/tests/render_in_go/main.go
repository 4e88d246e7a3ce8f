// Renders conversations with Go's own text/template, by the rules of Ollama: the oracle of test_ollama_in_go.py.
//
// Stdin: a JSON list of {"template", "messages": [{"role", "content"}]}. Stdout: a JSON list of {"text", "error"}.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type said struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type message struct {
	Role, Content, Thinking string
	Images, ToolCalls       []string
}

type question struct {
	Template string `json:"template"`
	Messages []said `json:"messages"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

// untilResponse gives the template's text up to the first action that writes .Response, with its open blocks closed.
func untilResponse(text string, tree *parse.Tree) string {
	depth := 0
	var find func(n parse.Node) int
	list := func(nodes *parse.ListNode) int {
		if nodes != nil {
			for _, n := range nodes.Nodes {
				if at := find(n); at >= 0 {
					return at
				}
			}
		}
		return -1
	}
	branch := func(b *parse.BranchNode) int {
		depth++
		for _, l := range []*parse.ListNode{b.List, b.ElseList} {
			if at := list(l); at >= 0 {
				return at
			}
		}
		depth--
		return -1
	}
	find = func(n parse.Node) int {
		switch n := n.(type) {
		case *parse.ActionNode:
			if strings.Contains(n.String(), "{{.Response}}") {
				return int(n.Position())
			}
		case *parse.IfNode:
			return branch(&n.BranchNode)
		case *parse.RangeNode:
			return branch(&n.BranchNode)
		}
		return -1
	}
	at := list(tree.Root)
	if at < 0 {
		return text
	}
	return text[:at+strings.Index(text[at:], "}}")+2] + strings.Repeat("{{ end }}", depth)
}

func main() {
	var questions []question
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	answers := make([]answer, len(questions))
	for i, q := range questions {
		text, err := render(q)
		answers[i].Text = text
		if err != nil {
			answers[i].Error = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		os.Exit(1)
	}
}

func render(q question) (string, error) {
	functions := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(q.Template)
	if err != nil {
		return "", err
	}
	run := func(values map[string]any) (string, error) {
		values["Think"], values["IsThinkSet"] = false, false
		var b strings.Builder
		err := parsed.Execute(&b, values)
		return b.String(), err
	}

	var systems []string
	var messages []*message
	for _, m := range q.Messages {
		if m.Role == "system" {
			systems = append(systems, m.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == m.Role && m.Role != "tool" {
			messages[n-1].Content += "\n\n" + m.Content
		} else {
			messages = append(messages, &message{Role: m.Role, Content: m.Content})
		}
	}
	if strings.Contains(q.Template, ".Messages") {
		system := strings.Join(systems, "\n\n")
		return run(map[string]any{"System": system, "Messages": messages, "Tools": []string{}, "Response": ""})
	}

	if !strings.Contains(q.Template, ".Response") {
		q.Template += "{{ .Response }}"
		if parsed, err = parsed.Parse(q.Template); err != nil {
			return "", err
		}
	}
	var out, system, prompt, reply string
	turn := func() error {
		text, err := run(map[string]any{"System": system, "Prompt": prompt, "Response": reply})
		out += text
		system, prompt, reply = "", "", ""
		return err
	}
	for _, m := range messages {
		if (m.Role == "system" && prompt+reply != "") || (m.Role == "user" && reply != "") {
			if err := turn(); err != nil {
				return "", err
			}
		}
		switch m.Role {
		case "system":
			system = m.Content
		case "user":
			prompt = m.Content
		case "assistant":
			reply = m.Content
		}
	}
	if parsed, err = parsed.Parse(untilResponse(q.Template, parsed.Tree)); err != nil {
		return "", err
	}
	last, err := run(map[string]any{"System": system, "Prompt": prompt, "Response": reply})
	return out + last, err
}
