package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
)

// buildID is how ids of builds look, of older servers too.
var buildID = regexp.MustCompile(`^(bd[a-z0-9]{16}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)

// lastBuild finds a build by id, or a template's last build by name.
func lastBuild(ctx context.Context, at *client.Client, name string) (id string, err error) {
	id, err = at.LastBuild(ctx, name)
	if err == nil || !client.IsNotFound(err) {
		return id, err
	}
	list, err := at.Templates(ctx)
	if err != nil {
		return "", err
	}
	for _, t := range list { // such as one that was built under another name
		if t.Name == name && t.Build == "" {
			return "", fmt.Errorf("%s was not built here, so there is no log", t.Name)
		}
		if t.Name == name {
			return t.Build, nil
		}
	}
	if buildID.MatchString(name) {
		return name, nil
	}
	return "", fmt.Errorf("there is no template or build %q: 'soulbox template list' shows the templates", name)
}

// noTemplate adds to a not-found error how to list templates.
func noTemplate(err error) error {
	if client.IsNotFound(err) {
		return fmt.Errorf("%w; 'soulbox template list' and 'soulbox sandbox snapshot list' show what there is", err)
	}
	return err
}

func (a *app) templateDeleteCommand() *cobra.Command {
	return &cobra.Command{Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete templates or snapshots", Args: atLeast("NAME"),
		ValidArgsFunction: a.completeTemplates, Long: "Delete templates or snapshots. Sandboxes made from them continue to run.",
		Example: "  soulbox template delete web",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			var errs error
			for _, name := range args {
				if err := at.DeleteTemplate(c.Context(), name); err != nil {
					errs = errors.Join(errs, noTemplate(err))
				} else {
					errs = errors.Join(errs, a.printf("%s\n", name))
				}
			}
			return errs
		}}
}

func (a *app) templateCopyCommand() *cobra.Command {
	return &cobra.Command{Use: "copy NAME NEW", Aliases: []string{"cp", "tag"}, Short: "Give a template another name",
		Args: exactly("NAME", "NEW"), ValidArgsFunction: a.completeTemplates,
		Long: "Give a template another name, perhaps with a :tag. It keeps its old name, and the two are independent: a build of one " +
			"leaves the other as it is. The copy takes no space.",
		Example: "  soulbox template copy web web:v2\n  soulbox template tag base ours",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			t, err := at.CopyTemplate(c.Context(), args[0], args[1])
			if err != nil {
				return noTemplate(err)
			}
			return a.printf("%s\n", t.Name)
		}}
}

func (a *app) pullCommand() *cobra.Command {
	return &cobra.Command{Use: "pull REF NAME", Short: "Make a template from an image of a registry", Args: exactly("REF", "NAME"),
		Long: "Make a template from an image of a registry, with the credentials of the server's user: it works only on the machine of " +
			"the server.",
		Example: "  soulbox template pull docker.io/library/alpine:3 alpine",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			t, err := at.Pull(c.Context(), args[1], args[0])
			if err != nil {
				return err
			}
			return a.printf("%s is ready: %d MB\n", t.Name, t.SizeMB)
		}}
}

func (a *app) pushCommand() *cobra.Command {
	return &cobra.Command{Use: "push NAME REF", Short: "Push a template to a registry", Args: exactly("NAME", "REF"),
		ValidArgsFunction: a.completeTemplates,
		Long: "Push a template to a registry, with the credentials of the server's user: it works only on the machine of the " +
			"server.",
		Example: "  soulbox template push web registry.example.com/team/web:1",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			return a.push(c.Context(), at.Client, args[0], args[1])
		}}
}

func (a *app) push(ctx context.Context, at *client.Client, name, reference string) error {
	t, err := at.Push(ctx, name, reference)
	if err != nil {
		return noTemplate(err)
	}
	return a.printf("%s is %s@%s\n", t.Name, reference, t.Digest)
}
