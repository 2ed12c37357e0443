package agent

// ShellRequest asks what a shell remembers.
type ShellRequest struct {
	Shell string `json:"shell"`
	User  string `json:"user,omitempty"`
}

// ShellInfo is what a shell remembers. It has names only, since values may be secret. Each list is cut at 100 names.
type ShellInfo struct {
	Cwd       string   `json:"cwd" is:"name"`
	Env       []string `json:"env,omitempty"`       // exported variables that were set
	Unset     []string `json:"unset,omitempty"`     // variables of the environment that were removed
	Variables []string `json:"variables,omitempty"` // all other variables
	Functions []string `json:"functions,omitempty"`
	Aliases   []string `json:"aliases,omitempty"`
	Options   []string `json:"options,omitempty"` // as arguments of set and shopt
}

// Bound cuts the lists and their names, to keep the answer small.
func (i *ShellInfo) Bound() {
	for _, list := range []*[]string{&i.Env, &i.Unset, &i.Variables, &i.Functions, &i.Aliases, &i.Options} {
		*list = (*list)[:min(len(*list), 100)]
		for j, name := range *list {
			(*list)[j] = Clip(name, 100)
		}
	}
}
